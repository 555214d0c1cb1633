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
from confidantd.planner.costs import (
    PlanDevice,
    link_cost,
    microbatch_seconds,
    stage_cost,
    stage_seconds,
)
from confidantd.planner.options import Options
from confidantd.planner.pace import NOTHING, before, behind, step_seconds
from confidantd.planner.search import Search
from confidantd.planner.workload import Form, Workload
from confidantd.schedule.one_f_one_b import in_flight

EXACT_DEVICES = 8
SHORT, MUCH_SLOWER = 2, 1.1  # which alternatives are looked for: devices, times the best
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


def fixed_partition(
    work: Workload, devices: Sequence[PlanDevice], layers: Sequence[int]
) -> Partition | None:
    """These layers on these devices, each in the fastest form that fits; None if one has none."""
    options = Options(work, devices, len(devices))
    forms: list[Form] = []
    for place, count in enumerate(layers):
        found = options.at(place, place)
        if len(found) < count:
            return None
        forms.append(found[count - 1].form)
    seconds = predicted_seconds(work, devices, layers, forms)
    return Partition(tuple(devices), tuple(layers), tuple(forms), seconds)


def _better_and_better(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Iterator[Partition]:
    """Partitions, each faster than those before it."""
    enough = math.inf
    for chosen, choices in _pipelines(work, devices, owner, use_all=use_all):
        found = _fastest(work, chosen, choices, owner, enough)
        if found is not None:
            enough = cost(found, owner)
            yield found


def _fastest(
    work: Workload,
    chosen: Sequence[PlanDevice],
    choices: Sequence[Sequence[int]],
    owner: DeviceId,
    enough: float,
) -> Partition | None:
    """The best pipeline of these choices, if its cost is under `enough`."""
    factors = [_text_factor(device, owner) for device in chosen]
    found = Search(work, chosen, choices, factors).fastest(enough)
    if found is None:
        return None
    stages = found[0].stages()
    used = tuple(chosen[device] for device, _, _ in stages)
    layers = tuple(count for _, count, _ in stages)
    forms = tuple(form for _, _, form in stages)
    return Partition(used, layers, forms, predicted_seconds(work, used, layers, forms))


def alternatives(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, best: Partition
) -> list[Partition]:
    """The best pipelines of other lengths than `best`, the fastest first: of one and two devices
    however slow, and of one more and one less if they are not much slower.
    """
    found: list[Partition] = []
    there = len(best.devices)
    for size in sorted({1, 2, there - 1, there + 1} - {there, 0}):
        if size > min(len(devices), work.layers, EXACT_DEVICES):
            continue
        enough = math.inf if size <= SHORT else MUCH_SLOWER * cost(best, owner)
        fastest: Partition | None = None
        for chosen, choices in _exact(_ranked(work, devices, owner), size):
            one = _fastest(work, chosen, choices, owner, enough)
            if one is not None:
                fastest, enough = one, cost(one, owner)
        found += [fastest] if fastest is not None else []
    return sorted(found, key=lambda partition: cost(partition, owner))


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
        stage_cost(work, device, count, head=index == last, embedding=index == 0, form=form)
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
        suffix = before(suffix, cost.forward, microbatch_seconds(work, cost), flying, count)
    return step_seconds(suffix, count)


_Pipelines = Iterator[tuple[list[PlanDevice], list[list[int]]]]


def _pipelines(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> _Pipelines:
    """Devices, and which of them may stand at each place: the shorter pipelines first."""
    ranked = _ranked(work, devices, owner)
    spacious = _spacious(ranked)
    sizes = [len(ranked)] if use_all else list(_sizes(min(len(ranked), work.layers)))
    # a good one soon leaves little to search
    for size in sizes:
        for some in _distinct(ranked[:size], spacious[:size]):
            for order in _distinct([some[0], *sorted(some[1:], key=_by_memory)],
                                   sorted(some, key=_by_memory)):  # fmt: skip
                yield order, [[place] for place in range(size)]
    for size in sizes:
        if size <= EXACT_DEVICES:
            yield from _exact(ranked, size)


def _exact(ranked: list[PlanDevice], size: int) -> _Pipelines:
    """Any of the fastest devices, and any of the most spacious, at every place."""
    for chosen in _distinct(ranked[:EXACT_DEVICES], _spacious(ranked)[:EXACT_DEVICES]):
        yield chosen, [list(range(len(chosen)))] * size


def _ranked(work: Workload, devices: Sequence[PlanDevice], owner: DeviceId) -> list[PlanDevice]:
    """The owner first, then the fastest."""
    each = {d.id: stage_seconds(work, d, 1, head=False) for d in devices}
    return sorted(devices, key=lambda d: (d.id != owner, each[d.id], d.id))


def _spacious(ranked: list[PlanDevice]) -> list[PlanDevice]:
    """The owner first, then those with most memory."""
    return [*ranked[:1], *sorted(ranked[1:], key=_by_memory)]


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
