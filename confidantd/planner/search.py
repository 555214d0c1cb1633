"""Exact search for the fastest partition: dynamic programming over layers, places and devices.

A label is a pipeline's beginning: which devices it uses, which one is last, how many layers
they hold, the sum of their times and the slowest of them. Of labels that agree in the first
three, only those count that no other one beats in both times. A label whose best possible
end is not faster than what is known already is dropped, so few are left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confidantd.planner.costs import PlanDevice, stage_seconds
from confidantd.planner.options import Options
from confidantd.planner.workload import Form, Workload

TIE = 1e-10  # relative; times closer than this are rounding


@dataclass(slots=True)  # not frozen: thousands are made, and that takes three times as long
class Label:
    """A beginning: used devices (bits), the first and last one, layers so far, and its times."""

    used: int
    first: int
    last: int
    layers: int
    total: float  # stages and links so far, of one microbatch
    slowest: float  # stage or link
    squares: int  # of layers: of equals the more even one is taken
    before: Label | None = None
    form: Form = "saved"

    def stages(self) -> list[tuple[int, int, Form]]:
        """(device, layers, form) of each stage, from the first on."""
        found: list[tuple[int, int, Form]] = []
        label: Label | None = self
        while label is not None:
            earlier = label.before.layers if label.before else 0
            found.append((label.last, label.layers - earlier, label.form))
            label = label.before
        return found[::-1]


class Search:
    """The fastest pipelines of exactly `stages` stages.

    `choices`: devices that may stand at each place. `factors`: what the time of a pipeline
    counts times, by its first device. `further`: microbatches after the first one, each of
    which costs the slowest stage or link once more.
    """

    def __init__(
        self,
        work: Workload,
        devices: Sequence[PlanDevice],
        stages: int,
        choices: Sequence[Sequence[int]],
        factors: Sequence[float],
    ) -> None:
        self._work = work
        self._stages = stages
        self._options = Options(work, devices, stages)
        self._choices = choices
        self._factors = factors
        self._generates = work.method is None
        self._further = 0 if self._generates else work.microbatches - 1
        self._ways = 1 if self._generates else 2  # a link carries a gradient back, too
        self._each = [stage_seconds(work, d, 1, head=False) for d in devices]
        links = [
            self._options.link(a, b)
            for a in range(len(devices))
            for b in range(len(devices))
            if a != b
        ]
        self._least_link = min(links, default=0.0)
        self._most = [0] * len(devices)
        for place, there in enumerate(choices):
            for d in there:
                self._most[d] = max(self._most[d], len(self._options.at(d, place)))
        self._rest = functools.cache(self._least_rest)

    def fastest(self, enough: float) -> tuple[Label, float] | None:
        """The best pipeline that takes less than `enough`, with its (weighted) seconds."""
        labels = [x for d in self._choices[0] for x in self._extended(None, d, 0, enough)]
        for place in range(1, self._stages):
            labels = [
                label
                for before in self._undominated(labels)
                for device in self._choices[place]
                if not before.used >> device & 1
                for label in self._extended(before, device, place, enough)
            ]
        best: tuple[Label, float] | None = None
        for label in labels:
            if label.layers != self._work.layers:
                continue
            seconds = self.seconds(label)
            if seconds < enough * (1 - TIE) or (
                best is not None
                and seconds <= best[1] * (1 + TIE)
                and label.squares < best[0].squares
            ):
                best, enough = (label, seconds), min(enough, seconds)
        return best

    def seconds(self, label: Label) -> float:
        """Weighted seconds of a complete pipeline: fill and drain once, then the slowest part
        for every further microbatch; of a token, the way back to the first stage.
        """
        total = label.total + self._further * label.slowest
        if self._generates and label.last != label.first:
            total += self._options.link(label.last, label.first)
        return total * self._factors[label.first]

    def _extended(
        self, before: Label | None, device: int, place: int, enough: float
    ) -> Iterator[Label]:
        """A beginning with one more stage, of any size that leaves a layer for each later one,
        as long as an end that takes less than `enough` is possible.
        """
        earlier = before.layers if before else 0
        later = self._stages - 1 - place
        most = self._work.layers - earlier - later
        options = self._options.at(device, place)
        if later == 0 and len(options) < most:
            return  # the last one must take all that is left
        total, slowest, squares, used, first = 0.0, 0.0, 0, 1 << device, device
        if before is not None:
            link = self._options.link(before.last, device)
            total, slowest = before.total + self._ways * link, max(before.slowest, link)
            squares, used, first = before.squares, before.used | used, before.first
        each, pace, most_later = self._rest(used, later)
        links, factor, further = (
            later * self._ways * self._least_link,
            self._factors[first],
            self._further,
        )
        for count in range(most if later == 0 else 1, min(most, len(options)) + 1):
            option = options[count - 1]
            seconds = option.seconds
            worst = max(slowest, seconds)
            if (total + seconds + further * worst) * factor >= enough:
                return  # and so is every larger share
            left = most - count + later
            if left > most_later:
                continue
            if (total + seconds + links + left * each
                    + further * max(worst, left * pace)) * factor >= enough:  # fmt: skip
                continue
            yield Label(
                used, first, device, earlier + count, total + seconds,
                0.0 if self._generates else worst, squares + count * count, before, option.form,
            )  # fmt: skip

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
        """Of labels that agree in all that their ends depend on those that no other one beats."""
        groups: dict[tuple[float, ...], list[Label]] = {}
        for label in labels:
            # a token goes back to the first stage; in training only the factor counts
            start = label.first if self._generates else self._factors[label.first]
            key = (label.used, start, label.last, label.layers)
            groups.setdefault(key, []).append(label)
        for group in groups.values():
            group.sort(key=lambda label: (label.total, label.slowest, label.squares))
            yield from _front(group)


def _front(group: Sequence[Label]) -> Iterator[Label]:
    """Of labels in order of their totals those that are better in something else."""
    kept: list[Label] = []
    for label in group:
        if not any(
            other.slowest <= label.slowest * (1 + TIE)
            and (other.squares <= label.squares or other.total < label.total * (1 - TIE)
                 or other.slowest < label.slowest * (1 - TIE))
            for other in kept
        ):  # fmt: skip
            kept.append(label)
    return iter(kept)
