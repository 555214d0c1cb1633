"""Contiguous layers to devices: the split, the order and the choice of devices with the least time.

Up to `EXACT_DEVICES` devices the answer is exact (`search`): every order of every subset,
every split, saved or recomputing. Of more devices it is exact over the owner and the
fastest ones, and over the owner and those with most memory; longer pipelines are tried
with the fastest and with the most spacious devices, in order of memory, because a stage
keeps the more microbatches the earlier it stands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.planner.costs import ASSUMED_GFLOPS, PlanDevice, link_cost, stage_cost
from confidantd.planner.pace import NOTHING, before, behind, step_seconds
from confidantd.planner.search import Search
from confidantd.planner.workload import Form, Workload
from confidantd.schedule.one_f_one_b import in_flight

EXACT_DEVICES = 8
OWNER_FIRST_SHARE = 0.05  # the embedding stays with the owner unless that costs more


@dataclass(frozen=True, slots=True)
class Partition:
    """Layer counts and forms of each device in pipeline order, and the predicted seconds.

    `seconds` is the step time in training and the time per token in generation.
    """

    devices: tuple[PlanDevice, ...]
    layers: tuple[int, ...]
    forms: tuple[Form, ...]
    seconds: float


def best_partition(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Partition | None:
    """The fastest partition that fits, or None. Of equals, the one with fewer devices.

    `use_all`: every device must hold at least one layer.
    """
    best: Partition | None = None
    for found in _better_and_better(work, devices, owner, use_all=use_all):
        best = found
    return best


def _better_and_better(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Iterator[Partition]:
    """Partitions, each faster than those before it."""
    enough = math.inf
    for chosen, choices in _pipelines(work, devices, owner, use_all=use_all):
        factors = [_text_factor(device, owner) for device in chosen]
        found = Search(work, chosen, choices, factors).fastest(enough)
        if found is None:
            continue
        label, enough = found
        stages = label.stages()
        used = tuple(chosen[device] for device, _, _ in stages)
        layers = tuple(count for _, count, _ in stages)
        forms = tuple(form for _, _, form in stages)
        yield Partition(used, layers, forms, predicted_seconds(work, used, layers, forms))


def cost(found: Partition, owner: DeviceId) -> float:
    """Seconds, a little more where the owner's token ids would leave its device."""
    return found.seconds * _text_factor(found.devices[0], owner)


def _text_factor(first: PlanDevice, owner: DeviceId) -> float:
    return 1.0 if first.id == owner else 1.0 + OWNER_FIRST_SHARE


def predicted_seconds(
    work: Workload,
    order: Sequence[PlanDevice],
    layers: Sequence[int],
    forms: Sequence[Form] = (),
) -> float:
    """Seconds of a step in closed form (`pace`), or of a token.

    Every stage is in saved form unless `forms` says otherwise.
    """
    forms = forms or ["saved"] * len(order)
    last = len(order) - 1
    links = [link_cost(work, a, b) for a, b in itertools.pairwise(order)]
    costs = [
        stage_cost(work, device, count, head=index == last, form=form)
        for index, (device, count, form) in enumerate(zip(order, layers, forms, strict=True))
    ]
    if work.method is None:
        back = [link_cost(work, order[-1], order[0])] if links else []
        ways = sum(link.seconds + link.latency for link in (*links, *back))
        return ways + sum(cost.forward + cost.backward for cost in costs)
    count, suffix = work.microbatches, NOTHING
    for index in range(last, -1, -1):
        if index < last:
            suffix = behind(suffix, links[index], count)
        cost = costs[index]
        flying = in_flight(index, last + 1, count)
        suffix = before(suffix, cost.forward, cost.forward + cost.backward, flying, count)
    return step_seconds(suffix, count)


_Pipelines = Iterator[tuple[list[PlanDevice], list[list[int]]]]


def _pipelines(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> _Pipelines:
    """Devices, and which of them may stand at each place: the shorter pipelines first."""
    ranked = sorted(devices, key=lambda d: (d.id != owner, -(d.gflops or ASSUMED_GFLOPS), d.id))
    spacious = [*ranked[:1], *sorted(ranked[1:], key=_by_memory)]
    sizes = [len(ranked)] if use_all else list(_sizes(min(len(ranked), work.layers)))
    # a good one soon leaves little to search
    for size in sizes:
        for some in _distinct(ranked[:size], spacious[:size]):
            for order in _distinct([some[0], *sorted(some[1:], key=_by_memory)],
                                   sorted(some, key=_by_memory)):  # fmt: skip
                yield order, [[place] for place in range(size)]
    for size in sizes:
        if size <= EXACT_DEVICES:
            for chosen in _distinct(ranked[:EXACT_DEVICES], spacious[:EXACT_DEVICES]):
                yield chosen, [list(range(len(chosen)))] * size


def _sizes(most: int) -> Iterator[int]:
    """Lengths of pipelines to try: all short ones, then each a tenth longer than the last."""
    size = 1
    while size < most:
        yield size
        size += max(1, size // 10)
    yield most


def _distinct(first: list[PlanDevice], second: list[PlanDevice]) -> list[list[PlanDevice]]:
    return [first] if first == second else [first, second]


def _by_memory(device: PlanDevice) -> int:
    return -device.available_bytes
