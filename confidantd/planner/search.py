"""Exact search for the fastest partition: dynamic programming over layers, places and devices.

Pipelines are built from their last stage on, where the loss is. A label is what stands so
far: which devices it uses, which one is in front, how many layers they hold, and how long
they take. Of labels that agree in the first three, only those count that no other one beats in
every time. A label whose best possible beginning is not faster than what is known already
is dropped, so few are left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confidantd.planner.costs import PlanDevice, layer_seconds
from confidantd.planner.options import Option, Options
from confidantd.planner.pace import (
    NOTHING,
    Suffix,
    before,
    behind,
    round_before,
    round_behind,
    round_seconds,
    step_seconds,
)
from confidantd.planner.workload import Form, Workload
from confidantd.schedule.one_f_one_b import in_flight

TIE = 1e-10  # relative; times closer than this are rounding


@dataclass(slots=True)  # not frozen: thousands are made, and that takes three times as long
class Label:
    """The end of a pipeline: used devices (bits), the one in front and the last one, layers so
    far, and times.
    """

    used: int
    front: int
    last: int
    layers: int
    suffix: Suffix
    squares: int  # of layers: of equals the more even one is taken
    after: Label | None = None
    form: Form = "saved"

    def stages(self) -> list[tuple[int, int, Form]]:
        """(device, layers, form) of each stage, from the first on."""
        found: list[tuple[int, int, Form]] = []
        label: Label | None = self
        while label is not None:
            later = label.after.layers if label.after else 0
            found.append((label.front, label.layers - later, label.form))
            label = label.after
        return found


class Search:
    """The fastest pipelines of exactly `len(choices)` stages.

    `choices`: devices that may stand at each place. `factors`: what the time of a pipeline
    counts times, by its first device.
    """

    def __init__(
        self,
        work: Workload,
        devices: Sequence[PlanDevice],
        choices: Sequence[Sequence[int]],
        factors: Sequence[float],
    ) -> None:
        self._work = work
        self._stages = len(choices)
        self._options = Options(work, devices, self._stages)
        self._choices = choices
        self._factors = factors
        self._generates = work.method is None
        self._count = work.requests if self._generates else work.microbatches
        self._each = [layer_seconds(work, d) for d in devices]
        self._least_link = self._shortest_way(len(devices))
        self._most = [0] * len(devices)
        for place, there in enumerate(choices):
            for d in there:
                self._most[d] = max(self._most[d], len(self._options.at(d, place)))
        self._rest = functools.cache(self._least_rest)

    def _shortest_way(self, devices: int) -> float:
        """No microbatch takes less over a link, there (and in training back)."""
        pairs = [(a, b) for a in range(devices) for b in range(devices) if a != b]
        costs = [self._options.link(a, b) for a, b in pairs]
        ways = 1 if self._generates else 2
        return ways * min((cost.seconds + cost.latency for cost in costs), default=0.0)

    def fastest(self, enough: float) -> tuple[Label, float] | None:
        """The best pipeline that takes less than `enough`, with its (weighted) seconds."""
        last = self._stages - 1
        labels = [x for d in self._choices[last] for x in self._extended(None, d, last, enough)]
        for place in range(last - 1, -1, -1):
            labels = [
                label
                for after in self._undominated(labels)
                for device in self._choices[place]
                if not after.used >> device & 1
                for label in self._extended(after, device, place, enough)
            ]
        best: tuple[Label, float] | None = None
        for label in labels:
            seconds = self._seconds(label)
            if seconds < enough * (1 - TIE) or (
                best is not None
                and seconds <= best[1] * (1 + TIE)
                and label.squares < best[0].squares
            ):
                best, enough = (label, seconds), min(enough, seconds)
        return best

    def _seconds(self, label: Label) -> float:
        """Weighted seconds of a whole pipeline; a token goes back to the first stage."""
        if self._generates:
            ends = label.last, label.front
            back = None if label.last == label.front else self._options.link(*ends)
            seconds = round_seconds(label.suffix, back, self._count)
        else:
            seconds = step_seconds(label.suffix, self._count)
        return seconds * self._factors[label.front]

    def _extended(
        self, after: Label | None, device: int, place: int, enough: float
    ) -> Iterator[Label]:
        """One more stage in front, of any size that leaves a layer for each earlier one, as long
        as a beginning with which it takes less than `enough` is possible.
        """
        later = after.layers if after else 0
        most = self._work.layers - later - place
        options = self._options.at(device, place)
        if place == 0 and len(options) < most:
            return  # the first one must take all that is left
        used = (after.used if after else 0) | 1 << device
        last, squares = (after.last, after.squares) if after else (device, 0)
        suffix = self._seen_from(device, after)
        factor = self._least_factor(used, device, place)
        each, pace, most_left = self._rest(used, place)
        ways = place * self._least_link
        for count in range(most if place == 0 else 1, min(most, len(options)) + 1):
            option = options[count - 1]
            found = self._put(option, suffix, place)
            if found.done * factor >= enough:
                return  # and so is every larger share
            left = self._work.layers - later - count
            if left > most_left:
                continue
            onward = found.there if self._generates else found.done
            least = max(found.done, onward + ways + left * each, self._count * left * pace)
            if least * factor < enough:
                yield Label(
                    used, device, last, later + count, found, squares + count * count, after,
                    option.form,
                )  # fmt: skip

    def _seen_from(self, device: int, after: Label | None) -> Suffix:
        if after is None:
            return NOTHING
        link = self._options.link(device, after.front)
        seen = round_behind if self._generates else behind
        return seen(after.suffix, link, self._count)

    def _put(self, option: Option, suffix: Suffix, place: int) -> Suffix:
        if self._generates:
            return round_before(suffix, option.seconds, self._count)
        flying = in_flight(place, self._stages, self._count)
        return before(suffix, option.forward, option.seconds, flying, self._count)

    def _least_factor(self, used: int, device: int, place: int) -> float:
        """What the time will count times at least, whoever comes to be first."""
        if place == 0:
            return self._factors[device]
        return min((f for d, f in enumerate(self._factors) if not used >> d & 1), default=math.inf)

    def _least_rest(self, used: int, stages: int) -> tuple[float, float, int]:
        """Of devices that are not used: the least seconds of a layer, those of a layer that the
        fastest `stages` of them share as if it could be cut, and how many layers fit at most.
        """
        if stages == 0:
            return 0.0, 0.0, 0
        free = [d for d in range(len(self._each)) if not used >> d & 1]
        fastest = sorted(self._each[d] for d in free)[:stages]
        most = sorted(self._most[d] for d in free)[-stages:]
        return fastest[0], 1 / sum(1 / s for s in fastest), sum(most)

    def _undominated(self, labels: Sequence[Label]) -> Iterator[Label]:
        """Of labels that agree in all that their beginnings depend on those that none beats."""
        groups: dict[tuple[int, ...], list[Label]] = {}
        for label in labels:
            last = label.last if self._generates else 0  # a token goes back from it
            groups.setdefault((label.used, label.front, last, label.layers), []).append(label)
        for group in groups.values():
            group.sort(key=lambda label: (label.suffix, label.squares))
            yield from _front(group)


def _front(group: Sequence[Label]) -> Iterator[Label]:
    """Of labels in order of their times those that are better in something than all before."""
    kept: list[Label] = []
    for label in group:
        if not any(_beats(other, label) for other in kept):
            kept.append(label)
    return iter(kept)


def _beats(one: Label, other: Label) -> bool:
    """Not slower in anything, and faster in something or as even."""
    pairs = list(zip(one.suffix, other.suffix, strict=True))
    if any(a > b * (1 + TIE) for a, b in pairs):
        return False
    return one.squares <= other.squares or any(a < b * (1 - TIE) for a, b in pairs)
