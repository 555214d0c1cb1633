"""Into how many microbatches a batch is cut.

More of them fill a pipeline and keep less at a time; but each run of a program has a cost of
its own, in full fine-tuning each adds up all gradients once more, and each crosses every link
with its latency. So every count is planned for, as far as it can still be the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice
from confidantd.planner.memory import stage_memory
from confidantd.planner.partition import (
    Partition,
    cost,
    faster_partition,
    fixed_partition,
    in_this_order,
    rough_partition,
)
from confidantd.planner.workload import Workload

MOST_MICROBATCHES = 1024  # more are taken only where a user asks for them
LEAST_RATIO = 1.3  # of a count to the one before: closer ones hardly differ in time
NEARLY = 0.02  # counts so close to the fastest are as good: predictions are not better than that


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut the batch: the workload, and devices with their speed at it."""

    work: Workload
    devices: tuple[PlanDevice, ...]


@dataclass(frozen=True, slots=True)
class OtherCount:
    """What another number of microbatches would take over the same devices; None: it would not
    fit there.
    """

    microbatches: int
    seconds: float | None


def counts(batch_size: int) -> tuple[int, ...]:
    """Divisors of a batch, from 1 on, that are worth comparing."""
    found = [1]
    for count in range(2, min(batch_size, MOST_MICROBATCHES) + 1):
        if batch_size % count == 0 and (count == batch_size or count >= LEAST_RATIO * found[-1]):
            found.append(count)
    return tuple(found)


def best_cut(
    cuts: Sequence[Cut], owner: DeviceId, *, use_all: bool, layers: Sequence[int] = ()
) -> tuple[Cut, Partition] | None:
    """The cut with the fastest partition that fits, or None. Of those that are nearly as fast,
    the one whose largest stage takes least memory.
    """
    found: list[tuple[Cut, Partition]] = []
    limit = math.inf
    for cut, rough in _promising(cuts, owner, use_all=use_all, layers=layers):
        best = rough
        if not layers:
            known = min(limit, math.inf if rough is None else cost(rough, owner))
            faster = faster_partition(cut.work, cut.devices, owner, known, use_all=use_all)
            best = faster or rough
        if best is not None:
            found.append((cut, best))
            limit = min(limit, (1 + NEARLY) * cost(best, owner))
    near = [(cut, best) for cut, best in found if cost(best, owner) <= limit]
    return min(near, key=lambda one: _largest_stage(*one), default=None)


def _promising(
    cuts: Sequence[Cut], owner: DeviceId, *, use_all: bool, layers: Sequence[int]
) -> list[tuple[Cut, Partition | None]]:
    """Cuts with a first partition, the fastest first: it leaves the others little to search."""
    found: list[tuple[Cut, Partition | None]] = []
    for cut in cuts:
        if layers:
            first = fixed_partition(cut.work, cut.devices, layers)
        else:
            first = rough_partition(cut.work, cut.devices, owner, use_all=use_all)
        found.append((cut, first))
    return sorted(found, key=lambda one: math.inf if one[1] is None else cost(one[1], owner))


def _largest_stage(cut: Cut, found: Partition) -> int:
    last = len(found.devices) - 1
    return max(
        stage_memory(
            cut.work, layers, embedding=i == 0, head=i == last, stage=i, stages=last + 1, form=form
        ).total
        for i, (layers, form) in enumerate(zip(found.layers, found.forms, strict=True))
    )


def other_counts(
    cuts: Sequence[Cut], chosen: Workload, found: Partition, layers: Sequence[int] = ()
) -> tuple[OtherCount, ...]:
    """The counts next to the chosen one: the best that these devices, in this order, do with them.

    Seconds are in the closed form, like those of `found`.
    """
    ordered = sorted(cuts, key=lambda cut: cut.work.microbatches)
    below = [cut for cut in ordered if cut.work.microbatches < chosen.microbatches][-1:]
    above = [cut for cut in ordered if cut.work.microbatches > chosen.microbatches][:1]
    others = []
    for cut in (*below, *above):
        by_id = {device.id: device for device in cut.devices}
        same = [by_id[device.id] for device in found.devices]
        work = cut.work
        other = fixed_partition(work, same, layers) if layers else in_this_order(work, same)
        seconds = None if other is None else other.seconds
        others.append(OtherCount(work.microbatches, seconds))
    return tuple(others)
