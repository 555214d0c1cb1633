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
    layer_seconds,
    link_cost,
    microbatch_seconds,
    stage_cost,
)
from confidantd.planner.options import Options
from confidantd.planner.pace import (
    NOTHING,
    before,
    behind,
    round_before,
    round_behind,
    round_seconds,
    step_seconds,
)
from confidantd.planner.search import Search
from confidantd.planner.simulate import LinkCost, StageCost, holders_of
from confidantd.planner.workload import Form, Workload
from confidantd.schedule.one_f_one_b import in_flight

EXACT_DEVICES = 8
SHORT, MUCH_SLOWER = 2, 1.1  # which alternatives are looked for: devices, times the best
OWNER_FIRST_SHARE = 0.05  # the embedding stays with the owner unless that costs more

_Pipelines = Iterator[tuple[list[PlanDevice], list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Partition:
    """Layer counts and forms of each device in pipeline order, and the predicted seconds.

    `seconds` is the step time in training, and in generation the time of a round: a token
    for every request.
    """

    devices: tuple[PlanDevice, ...]
    layers: tuple[int, ...]
    forms: tuple[Form, ...]
    seconds: float

    @property
    def holders(self) -> tuple[int, ...]:
        """For each stage the first one on its device: others than itself where it has two."""
        return holders_of([device.id for device in self.devices])

    @property
    def is_ring(self) -> bool:
        """Whether its first device holds the last stage, too."""
        return self.holders[-1] != len(self.devices) - 1


def best_partition(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Partition | None:
    """The fastest partition that fits, or None. Of equals, the one with fewer devices.

    `use_all`: every device must hold at least one layer.
    """
    rough = rough_partition(work, devices, owner, use_all=use_all)
    enough = math.inf if rough is None else cost(rough, owner)
    return faster_partition(work, devices, owner, enough, use_all=use_all) or rough


def rough_partition(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Partition | None:
    """The best of a few orders of the fastest and of the most spacious devices.

    A good one, found fast, leaves little to search. None does not mean that nothing fits.
    """
    pipelines = _in_few_orders(work, devices, owner, use_all=use_all)
    return _best_of(work, owner, pipelines, math.inf)


def faster_partition(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, enough: float, *, use_all: bool
) -> Partition | None:
    """The fastest one in any order, if its cost is under `enough`."""
    ranked = _ranked(work, devices, owner)
    sizes = [len(ranked)] if use_all else range(1, min(len(ranked), work.layers) + 1)
    exact = (found for size in sizes if size <= EXACT_DEVICES for found in _exact(ranked, size))
    return _best_of(work, owner, exact, enough)


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


def in_this_order(work: Workload, devices: Sequence[PlanDevice]) -> Partition | None:
    """The fastest partition over all of these devices in this order."""
    choices = [[place] for place in range(len(devices))]
    return _fastest(work, devices, choices, devices[0].id, math.inf)


def _best_of(
    work: Workload, owner: DeviceId, pipelines: _Pipelines, enough: float
) -> Partition | None:
    """The fastest of these, if its cost is under `enough`."""
    best: Partition | None = None
    for chosen, choices in pipelines:
        found = _fastest(work, chosen, choices, owner, enough)
        if found is not None:
            best, enough = found, cost(found, owner)
    return best


def _fastest(
    work: Workload,
    chosen: Sequence[PlanDevice],
    choices: Sequence[Sequence[int]],
    owner: DeviceId,
    enough: float,
) -> Partition | None:
    """The best pipeline of these choices, if its cost is under `enough`."""
    factors = [text_factor(device, owner) for device in chosen]
    found = Search(work, chosen, choices, factors).fastest(enough)
    if found is None:
        return None
    stages = found[0].stages()
    used = tuple(chosen[device] for device, _, _ in stages)
    layers = tuple(count for _, count, _ in stages)
    forms = tuple(form for _, _, form in stages)
    return Partition(used, layers, forms, predicted_seconds(work, used, layers, forms))


def alternatives(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    best: Partition,
    *,
    however_slow: bool,
) -> list[Partition]:
    """The best pipelines of one device more and of one less than `best`, if they are not much
    slower; and those of one and of two devices `however_slow`.
    """
    found: list[Partition] = []
    there = len(best.devices)
    always = set(range(1, SHORT + 1)) if however_slow else set()
    for size in sorted(({there - 1, there + 1} | always) - {there, 0}):
        if size > min(len(devices), work.layers, EXACT_DEVICES):
            continue
        enough = math.inf if size in always else MUCH_SLOWER * cost(best, owner)
        fastest = _best_of(work, owner, _exact(_ranked(work, devices, owner), size), enough)
        found += [fastest] if fastest is not None else []
    return found


def cost(found: Partition, owner: DeviceId) -> float:
    """Seconds, a little more where the owner's token ids would leave its device."""
    return found.seconds * text_factor(found.devices[0], owner)


def text_factor(first: PlanDevice, owner: DeviceId) -> float:
    """What the time of a pipeline with such a first device counts times."""
    return 1.0 if first.id == owner else 1.0 + OWNER_FIRST_SHARE


def predicted_seconds(
    work: Workload,
    order: Sequence[PlanDevice],
    layers: Sequence[int],
    forms: Sequence[Form] = (),
) -> float:
    """Seconds of a step in closed form (`pace`), or of a round of tokens.

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
        back = link_cost(work, order[-1], order[0]) if links else None
        return _round_seconds(costs, links, back, work.requests)
    count, suffix = work.microbatches, NOTHING
    for index in range(last, -1, -1):
        if index < last:
            suffix = behind(suffix, links[index], count)
        cost = costs[index]
        flying = in_flight(index, last + 1, count)
        suffix = before(suffix, cost.forward, microbatch_seconds(work, cost), flying, count)
    return step_seconds(suffix, count)


def _round_seconds(
    costs: Sequence[StageCost], links: Sequence[LinkCost], back: LinkCost | None, requests: int
) -> float:
    suffix = NOTHING
    for index in range(len(costs) - 1, -1, -1):
        if index < len(links):
            suffix = round_behind(suffix, links[index], requests)
        suffix = round_before(suffix, costs[index].forward + costs[index].backward, requests)
    return round_seconds(suffix, back, requests)


def _in_few_orders(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> _Pipelines:
    """Devices, and which of them may stand at each place: the shorter pipelines first."""
    ranked = _ranked(work, devices, owner)
    spacious = _spacious(ranked)
    sizes = [len(ranked)] if use_all else list(_sizes(min(len(ranked), work.layers)))
    for size in sizes:
        for some in _distinct(ranked[:size], spacious[:size]):
            for order in _distinct([some[0], *sorted(some[1:], key=_by_memory)],
                                   sorted(some, key=_by_memory)):  # fmt: skip
                yield order, [[place] for place in range(size)]


def _exact(ranked: list[PlanDevice], size: int) -> _Pipelines:
    """Any of the fastest devices, and any of the most spacious, at every place."""
    for chosen in _distinct(ranked[:EXACT_DEVICES], _spacious(ranked)[:EXACT_DEVICES]):
        yield chosen, [list(range(len(chosen)))] * size


def _ranked(work: Workload, devices: Sequence[PlanDevice], owner: DeviceId) -> list[PlanDevice]:
    """The owner first, then the fastest."""
    each = {d.id: layer_seconds(work, d) for d in devices}
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
