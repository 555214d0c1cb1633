"""What the choices of a plan cost: the same step with one of them made differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice
from confidantd.planner.memory import stage_memory
from confidantd.planner.microbatches import Cut, OtherCount, other_counts
from confidantd.planner.partition import Partition, best_partition, predicted_seconds
from confidantd.planner.score import simulated_cost, simulated_seconds
from confidantd.planner.workload import Workload

MOST_ALTERNATIVES = 2


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan that would do: names of its devices in order, their layers, its seconds.

    `text_leaves`: the first device is not the owner's, so that token ids would leave that.
    """

    devices: tuple[str, ...]
    layers: tuple[int, ...]
    seconds: float
    text_leaves: bool = False


@dataclass(frozen=True, slots=True)
class Recomputing:
    """A stage computes its blocks' forward a second time, because what the backward needs does
    not fit by `short_bytes`. With that memory a step would take `seconds`.
    """

    device: DeviceId
    name: str
    short_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that `confidant plan` says besides the plan itself.

    `faster`: what would run if the user did not insist on all devices, where that is faster.
    """

    alternatives: tuple[Alternative, ...] = ()
    faster: Alternative | None = None
    recomputing: tuple[Recomputing, ...] = ()
    other_counts: tuple[OtherCount, ...] = ()


def explain(
    chosen: Cut,
    found: Partition,
    providers: Sequence[int],
    owner: DeviceId,
    cuts: Sequence[Cut],
    others: Sequence[Partition],
    *,
    insists: bool,
    layers: Sequence[int],
) -> Explanation:
    """The choices of a plan; `found` as it runs, with so many further `providers` a stage.

    `cuts` are the ways to cut the batch, `others` the next-best plans. `insists`: the user has
    named the devices. With `layers` their sizes, too.
    """
    return Explanation(
        tuple(_alternative(chosen.work, other, owner) for other in others[:MOST_ALTERNATIVES]),
        _faster(chosen, found, owner) if insists else None,
        _recomputing(chosen.work, found, providers),
        _other_counts(cuts, chosen.work, found, layers),
    )


def _alternative(work: Workload, other: Partition, owner: DeviceId) -> Alternative:
    names = tuple(device.name for device in other.devices)
    leaves = other.devices[0].id != owner
    return Alternative(names, other.layers, simulated_seconds(work, other), leaves)


def _faster(chosen: Cut, found: Partition, owner: DeviceId) -> Alternative | None:
    """The best plan over any of the devices, if the user's wish keeps it from running."""
    free = best_partition(chosen.work, chosen.devices, owner, use_all=False)
    if free is None:
        return None
    slower = simulated_cost(chosen.work, free, owner) >= simulated_cost(chosen.work, found, owner)
    return None if slower else _alternative(chosen.work, free, owner)


def _recomputing(
    work: Workload, found: Partition, providers: Sequence[int]
) -> tuple[Recomputing, ...]:
    return tuple(
        _of_stage(work, found, index, device, providers[index])
        for index, device in enumerate(found.devices)
        if work.method is not None
        and found.forms[index] == "recompute"
        and found.holders.count(found.holders[index]) == 1
    )


def _of_stage(
    work: Workload, found: Partition, index: int, device: PlanDevice, providers: int
) -> Recomputing:
    last = len(found.devices) - 1
    memory = stage_memory(
        work, found.layers[index], embedding=index == 0, head=index == last, stage=index,
        stages=last + 1, form="saved", providers=providers,
    )  # fmt: skip
    forms = (*found.forms[:index], "saved", *found.forms[index + 1 :])
    saved = replace(found, forms=forms)
    short = memory.total - device.available_bytes
    return Recomputing(device.id, device.name, short, simulated_seconds(work, saved))


def _other_counts(
    cuts: Sequence[Cut], work: Workload, found: Partition, layers: Sequence[int]
) -> tuple[OtherCount, ...]:
    """As simulated seconds, like the plan's own: what the closed form says in proportion.

    Nothing for a ring: the closed form does not know that two of its stages take turns.
    """
    if work.method is None or found.is_ring:
        return ()
    closed = predicted_seconds(work, found.devices, found.layers, found.forms)
    ratio = simulated_seconds(work, found) / closed
    return tuple(
        replace(other, seconds=None if other.seconds is None else other.seconds * ratio)
        for other in other_counts(cuts, work, found, layers)
    )
