"""Contiguous layers to devices: the split, the order and the choice of devices with the least time.

For an order of devices the split is exact: a stage's time is linear in its layers, so
for each possible bottleneck the fastest devices are filled first, up to what their
memory and that bottleneck allow. Up to `EXHAUSTIVE_DEVICES` devices every order of every
subset is tried. Up to `SUBSET_DEVICES` every subset with every choice of its two ends,
those between in order of memory, because a stage keeps the more microbatches the earlier
it stands. Beyond that only the fastest ones and those with most memory, the owner first.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.planner.costs import ASSUMED_GFLOPS, PlanDevice, link_seconds, stage_seconds
from confidantd.planner.memory import stage_memory
from confidantd.planner.workload import Form, Workload

EXHAUSTIVE_DEVICES = 5  # 325 orders; eight would be 109,600
SUBSET_DEVICES = 8  # 3,592 orders
OWNER_FIRST_SHARE = 0.05  # the embedding stays with the owner unless that costs more
TIE = 1e-9  # relative; times closer than this are rounding


@dataclass(frozen=True, slots=True)
class Partition:
    """Layer counts of each device in pipeline order, and the predicted seconds.

    `seconds` is the step time in training and the time per token in generation.
    """

    devices: tuple[PlanDevice, ...]
    layers: tuple[int, ...]
    seconds: float


def best_partition(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Partition | None:
    """The fastest partition that fits, or None. Of equals, the one with fewer devices.

    `use_all`: every device must hold at least one layer.
    """
    best: Partition | None = None
    for order in _orders(devices, owner, use_all=use_all):
        if len(order) > work.layers:
            continue
        enough = math.inf if best is None else cost(best, owner) * (1 - TIE)
        if _least_seconds(work, order) * _text_factor(order, owner) >= enough:
            continue
        layers = split_layers(work, order)
        if layers is None:
            continue
        found = Partition(order, layers, predicted_seconds(work, order, layers))
        if cost(found, owner) < enough:
            best = found
    return best


def cost(found: Partition, owner: DeviceId) -> float:
    """Seconds, a little more where the owner's token ids would leave its device."""
    return found.seconds * _text_factor(found.devices, owner)


def _text_factor(order: Sequence[PlanDevice], owner: DeviceId) -> float:
    return 1.0 if order[0].id == owner else 1.0 + OWNER_FIRST_SHARE


def predicted_seconds(
    work: Workload,
    order: Sequence[PlanDevice],
    layers: Sequence[int],
    forms: Sequence[Form] = (),
) -> float:
    """Step time: fill and drain once, then the bottleneck for every further microbatch.

    Every stage is in saved form unless `forms` says otherwise.
    """
    all_saved: Sequence[Form] = ["saved"] * len(order)
    last = len(order) - 1
    stages = [
        stage_seconds(work, device, count, head=index == last, form=form)
        for index, (device, count, form) in enumerate(
            zip(order, layers, forms or all_saved, strict=True)
        )
    ]
    there, slowest = _links(work, order)
    return sum(stages) + there + _further(work) * max(slowest, *stages)


def split_layers(work: Workload, order: Sequence[PlanDevice]) -> tuple[int, ...] | None:
    """Layers of each device, at least one each, with the least predicted seconds.

    None if no split fits. Of equals, the most even one.
    """
    shares = [_share(work, device, i, len(order)) for i, device in enumerate(order)]
    if min(share.most for share in shares) < 1:
        return None
    bounds = sorted({share.seconds(n) for share in shares for n in range(1, share.most + 1)})
    if _fill(shares, work.layers, bounds[-1]) is None:
        return None
    first = bisect.bisect_left(bounds, 1, key=lambda b: _fill(shares, work.layers, b) is not None)
    return _best_bound(work, order, shares, bounds[first:])


def _best_bound(
    work: Workload, order: Sequence[PlanDevice], shares: Sequence[_Share], bounds: Sequence[float]
) -> tuple[int, ...]:
    """The best split under any of the bottlenecks `bounds` (ascending), each of which fits."""

    def split(bound: float) -> tuple[int, ...]:
        layers = _fill(shares, work.layers, bound)
        assert layers is not None  # what fits under one bound fits under every higher one
        return layers

    def seconds(bound: float) -> float:
        return predicted_seconds(work, order, split(bound))

    if _further(work) == 0:  # only the sum counts, which a higher bound never raises
        enough = seconds(bounds[-1]) * (1 + TIE)
        return split(bounds[bisect.bisect_left(bounds, 1, key=lambda b: seconds(b) <= enough)])
    best, best_seconds = bounds[0], seconds(bounds[0])
    least = min(share.each for share in shares) * work.layers + _links(work, order)[0]
    for bound in bounds[1:]:
        if least + _further(work) * bound >= best_seconds:
            break  # no better sum can make up for a slower bottleneck
        if (found := seconds(bound)) < best_seconds * (1 - TIE):
            best, best_seconds = bound, found
    return split(best)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one device of an order takes: n layers, at most `most`, in fixed + n * each seconds."""

    most: int
    each: float
    fixed: float

    def seconds(self, layers: int) -> float:
        return self.fixed + layers * self.each

    def within(self, seconds: float) -> int:
        """Most layers that take no longer than that."""
        return min(self.most, math.floor((seconds - self.fixed) / self.each + TIE))


def _share(work: Workload, device: PlanDevice, stage: int, stages: int) -> _Share:
    head = stage == stages - 1

    def memory_of(layers: int) -> int:
        return stage_memory(
            work, layers, embedding=stage == 0, head=head, stage=stage, stages=stages
        ).total

    possible = range(1, work.layers - stages + 2)
    most = bisect.bisect_right(possible, device.available_bytes, key=memory_of)
    each = stage_seconds(work, device, 1, head=False)
    return _Share(most, each, stage_seconds(work, device, 1, head=head) - each)


def _fill(shares: Sequence[_Share], layers: int, bound: float) -> tuple[int, ...] | None:
    """The split with the least sum of times in which no stage takes longer than `bound`."""
    most = [share.within(bound) for share in shares]
    if min(most) < 1 or sum(most) < layers:
        return None
    counts = [1] * len(shares)
    left = layers - len(shares)
    for index in sorted(range(len(shares)), key=lambda i: shares[i].each):
        more = min(left, most[index] - 1)
        counts[index] += more
        left -= more
    return tuple(counts)


def _links(work: Workload, order: Sequence[PlanDevice]) -> tuple[float, float]:
    """Seconds of all links for one microbatch there and back (or a token's round), and the slowest.

    The two directions of a link overlap.
    """
    links = [link_seconds(work, a, b) for a, b in itertools.pairwise(order)]
    if work.method is None:
        back = [link_seconds(work, order[-1], order[0])] if links else []
        return sum([*links, *back]), 0.0
    return 2 * sum(links), max(links, default=0.0)


def _further(work: Workload) -> int:
    """Microbatches after the first one: each costs the bottleneck once more."""
    return work.microbatches - 1 if work.method else 0


def _least_seconds(work: Workload, order: Sequence[PlanDevice]) -> float:
    """No split of an order is faster than this: as if layers could be cut, and memory were free."""
    each = [stage_seconds(work, device, 1, head=False) for device in order]
    there, slowest = _links(work, order)
    balanced = work.layers / sum(1 / seconds for seconds in each)
    return work.layers * min(each) + there + _further(work) * max(balanced, slowest)


def _orders(
    devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Iterator[tuple[PlanDevice, ...]]:
    """Orders to try, those with fewer devices first, and of these the owner first."""
    ranked = sorted(devices, key=lambda d: (d.id != owner, -(d.gflops or ASSUMED_GFLOPS), d.id))
    for size in [len(ranked)] if use_all else range(1, len(ranked) + 1):
        if len(ranked) <= EXHAUSTIVE_DEVICES:
            yield from itertools.permutations(ranked, size)
        elif len(ranked) <= SUBSET_DEVICES:
            for subset in itertools.combinations(ranked, size):
                yield from _with_ends(subset)
        else:
            spacious = [ranked[0], *sorted(ranked[1:], key=_by_memory)]
            for chosen in (ranked[:size], spacious[:size]):
                yield (chosen[0], *sorted(chosen[1:], key=_by_memory))
                yield tuple(sorted(chosen, key=_by_memory))


def _with_ends(subset: tuple[PlanDevice, ...]) -> Iterator[tuple[PlanDevice, ...]]:
    """Every choice of the first and the last device; those between by memory."""
    if len(subset) == 1:
        yield subset
    for first, last in itertools.permutations(subset, 2):
        between = (d for d in subset if d not in (first, last))
        yield (first, *sorted(between, key=_by_memory), last)


def _by_memory(device: PlanDevice) -> int:
    return -device.available_bytes
