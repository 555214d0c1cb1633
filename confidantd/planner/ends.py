"""The owner keeps both ends: embedding, final norm, head and loss on the device with the data.

Then text and labels never leave it, and a tied table needs no exchange over the network. The
pipeline is a ring: the owner's first stage, the other devices, the owner's last stage, which
may have as few as no blocks. Both of the owner's stages share its processor and memory.

A heuristic: the devices and their order are those of the best plan without that wish, or
fewer of them, the slowest ones left out. Their layers begin in proportion to speed and move
between two stages at a time as long as a simulated step gets shorter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice, layer_seconds
from confidantd.planner.memory import stage_memory
from confidantd.planner.partition import Partition
from confidantd.planner.score import simulated_seconds
from confidantd.planner.workload import Form, Workload

MOST_COST = 0.05  # of a step: what it may cost without being asked for
MOST_BETWEEN = 8  # devices between the ends
LARGEST_MOVES = (4, 2, 1)  # layers that move at a time, the large ones first


def both_ends(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    best: Partition,
    *,
    use_all: bool = False,
) -> Partition | None:
    """The fastest ring that was found and fits; None if there is none, or for one device.

    `use_all`: every device must be in it.
    """
    if work.method is None or len(devices) < 2 or work.layers < 2:
        return None
    first = next(device for device in devices if device.id == owner)
    found = [
        ring
        for between in _between(work, devices, first, best, use_all=use_all)
        if (ring := _Ring(work, [first, *between, first]).best()) is not None
    ]
    return min(found, key=lambda ring: ring.seconds, default=None)


def _between(
    work: Workload,
    devices: Sequence[PlanDevice],
    first: PlanDevice,
    best: Partition,
    *,
    use_all: bool,
) -> Iterator[list[PlanDevice]]:
    """Devices between the ends, in order: those of the best plan, and fewer and fewer."""
    order = [device for device in best.devices if device.id != first.id]
    others = [device for device in devices if device.id != first.id]
    if use_all:
        yield [*order, *(device for device in others if device not in order)]
        return
    order = order[:MOST_BETWEEN]
    if not order:
        order = [min(others, key=lambda d: layer_seconds(work, d))]
    while order:
        if len(order) <= work.layers:
            yield list(order)
        slowest = max(order, key=lambda d: layer_seconds(work, d))
        order.remove(slowest)


class _Ring:
    """One order of devices, the first and the last of which is the owner."""

    def __init__(self, work: Workload, devices: list[PlanDevice]) -> None:
        self._work, self._devices = work, devices
        self._last = len(devices) - 1

    def best(self) -> Partition | None:
        """Layers and forms of the shortest step that was found."""
        layers = self._proportional()
        seconds, forms = self._judged(layers)
        moves = [
            (a, b, size)
            for size in LARGEST_MOVES
            for a, b in itertools.permutations(range(self._last + 1), 2)
        ]
        better = True
        while better:
            better = False
            for source, target, size in moves:
                tried = list(layers)
                tried[source] -= size
                tried[target] += size
                if tried[source] < (1 if 0 < source < self._last else 0):
                    continue
                found, found_forms = self._judged(tried)
                if found < seconds:
                    layers, seconds, forms, better = tried, found, found_forms, True
        if forms is None:
            return None
        return self._partition(layers, forms, seconds)

    def _partition(
        self, layers: Sequence[int], forms: tuple[Form, ...], seconds: float
    ) -> Partition:
        return Partition(tuple(self._devices), tuple(layers), forms, seconds)

    def _proportional(self) -> list[int]:
        """Layers by speed; the owner's all at the beginning."""
        middle = self._devices[:-1]
        speeds = [1 / layer_seconds(self._work, d) for d in middle]
        shares = [self._work.layers * speed / sum(speeds) for speed in speeds]
        layers = [max(1, int(share)) for share in shares]
        while sum(layers) > self._work.layers:
            layers[layers.index(max(layers))] -= 1
        layers[0] += self._work.layers - sum(layers)
        return [*layers, 0]

    def _judged(self, layers: Sequence[int]) -> tuple[float, tuple[Form, ...] | None]:
        """Seconds of a step, and the forms that fit; where nothing fits, how far that is from
        it, as a time beyond all others.
        """
        forms: tuple[Form, ...] = ()
        for found in self._forms(layers):
            forms = found
            lacking = self._lacking(layers, forms)
            if lacking == 0:
                return simulated_seconds(self._work, self._partition(layers, forms, 0.0)), forms
        return 1e12 + self._lacking(layers, forms), None

    def _forms(self, layers: Sequence[int]) -> Iterator[tuple[Form, ...]]:
        """All saved, then ever more of what does not fit recomputing."""
        forms: list[Form] = ["saved"] * len(layers)
        yield tuple(forms)
        for place in sorted(range(len(layers)), key=lambda i: -layers[i]):
            if self._short(layers, forms, place) > 0:
                forms[place] = "recompute"
                yield tuple(forms)
        again: Form = "recompute"
        yield (again,) * len(layers)

    def _lacking(self, layers: Sequence[int], forms: Sequence[Form]) -> int:
        """Bytes that the devices are short of, summed up."""
        places = range(self._last)  # the owner's two stages count together
        return sum(max(0, self._short(layers, forms, place)) for place in places)

    def _short(self, layers: Sequence[int], forms: Sequence[Form], place: int) -> int:
        """Bytes that the device at a place is short of."""
        own = (0, self._last) if place in (0, self._last) else (place,)
        needs = sum(self._memory(layers[i], forms[i], i) for i in own)
        return needs - self._devices[place].available_bytes

    def _memory(self, layers: int, form: Form, place: int) -> int:
        return stage_memory(
            self._work, layers, embedding=place == 0, head=place == self._last,
            stage=place, stages=self._last + 1, form=form,
        ).total  # fmt: skip
