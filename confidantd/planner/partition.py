"""Contiguous layers to devices: the split, the order and the choice of devices with the least time.

For an order of devices, dynamic programming over the layers: the bottleneck
(slowest stage or link) is minimised in training, the sum of stage times in
generation, under every device's memory cap. Up to `EXHAUSTIVE_DEVICES` devices every
order of every subset is tried; beyond that the fastest ones in order of speed, the
owner first.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.planner.memory import stage_memory
from confidantd.planner.workload import Workload, stage_flops

EXHAUSTIVE_DEVICES = 5  # 325 orders; eight would be 109,600
ASSUMED_GFLOPS = 5.0  # of a device that has not been measured: a slow phone
ASSUMED_MBPS = 50.0  # of a link that has not been measured: ordinary Wi-Fi
ASSUMED_ROUND_TRIP_SECONDS = 0.005
OWNER_FIRST_SHARE = 0.05  # the embedding stays with the owner unless that costs more
GENERATION_EFFICIENCY = 0.05  # products with one row are bound by memory, not arithmetic


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """A device as the planner sees it; `gflops` 0 and None are unmeasured."""

    id: DeviceId
    name: str
    available_bytes: int
    gflops: float
    bandwidth_mbps: float | None = None
    round_trip_seconds: float | None = None


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
        layers = split_layers(work, order)
        if layers is None:
            continue
        found = Partition(order, layers, predicted_seconds(work, order, layers))
        cost = _cost_with_text(found, owner)
        if best is None or cost < _cost_with_text(best, owner) * (1 - 1e-9):
            best = found
    return best


def _cost_with_text(found: Partition, owner: DeviceId) -> float:
    """Seconds, a little more where the owner's token ids would leave its device."""
    return found.seconds * (1.0 if found.devices[0].id == owner else 1.0 + OWNER_FIRST_SHARE)


def stage_seconds(work: Workload, device: PlanDevice, layers: int, *, head: bool) -> float:
    """Seconds of one microbatch (training) or one token (generation) on a device."""
    gflops = device.gflops or ASSUMED_GFLOPS
    if work.method is None:
        gflops *= GENERATION_EFFICIENCY
    return stage_flops(work, layers, head=head) / (gflops * 1e9)


def link_seconds(work: Workload, first: PlanDevice, second: PlanDevice) -> float:
    """Seconds that one activation takes from one device to another."""
    mbps = min(d.bandwidth_mbps or ASSUMED_MBPS for d in (first, second))
    trips = [d.round_trip_seconds for d in (first, second) if d.round_trip_seconds is not None]
    latency = max(trips, default=ASSUMED_ROUND_TRIP_SECONDS) / 2
    return 8 * work.activation_bytes / (mbps * 1e6) + latency


def predicted_seconds(work: Workload, order: Sequence[PlanDevice], layers: Sequence[int]) -> float:
    """Step time: fill and drain once, then the bottleneck for every further microbatch."""
    last = len(order) - 1
    stages = [
        stage_seconds(work, device, count, head=index == last)
        for index, (device, count) in enumerate(zip(order, layers, strict=True))
    ]
    links = [link_seconds(work, a, b) for a, b in itertools.pairwise(order)]
    if work.method is None:
        back = [link_seconds(work, order[-1], order[0])] if last else []
        return sum(stages) + sum(links) + sum(back)
    there_and_back = [2 * seconds for seconds in links]
    bottleneck = max([*stages, *links])  # the two directions of a link overlap
    return sum(stages) + sum(there_and_back) + (work.microbatches - 1) * bottleneck


def split_layers(work: Workload, order: Sequence[PlanDevice]) -> tuple[int, ...] | None:
    """Layers of each device, at least one each, with the least bottleneck (or sum).

    None if no split fits.
    """
    stages, layers = len(order), work.layers
    join: Callable[[float, float], float] = max if work.method else operator.add
    # best[n]: least cost of the first n layers on the devices so far, and their counts
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for index, device in enumerate(order):
        head = index == stages - 1
        cost = [math.inf] + [
            _cost(work, device, count, index, stages) for count in range(1, layers + 1)
        ]
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for done, (so_far, counts) in best.items():
            most = layers - done - (stages - index - 1)
            for count in [layers - done] if head else range(1, most + 1):
                if count < 1 or math.isinf(cost[count]):
                    continue
                total = join(so_far, cost[count])
                if done + count not in after or total < after[done + count][0]:
                    after[done + count] = (total, (*counts, count))
        best = after
    found = best.get(layers)
    return found[1] if found else None


def _cost(work: Workload, device: PlanDevice, layers: int, stage: int, stages: int) -> float:
    """Seconds of a stage, infinite where it does not fit."""
    head = stage == stages - 1
    memory = stage_memory(work, layers, embedding=stage == 0, head=head, stage=stage, stages=stages)
    if memory.total > device.available_bytes:
        return math.inf
    return stage_seconds(work, device, layers, head=head)


def _orders(
    devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Iterator[tuple[PlanDevice, ...]]:
    """Orders to try, those with fewer devices first, and of these the owner first."""
    ranked = sorted(devices, key=lambda d: (d.id != owner, -(d.gflops or ASSUMED_GFLOPS), d.id))
    sizes = [len(ranked)] if use_all else range(1, len(ranked) + 1)
    for size in sizes:
        if len(ranked) <= EXHAUSTIVE_DEVICES:
            yield from itertools.permutations(ranked, size)
        else:
            yield tuple(ranked[:size])
            yield tuple(sorted(ranked[:size], key=lambda d: -d.available_bytes))
