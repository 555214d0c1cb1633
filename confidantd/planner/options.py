"""What one device can do at one place of a pipeline: how many layers, in which form, how fast."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from confidantd.planner.costs import PlanDevice, link_cost, microbatch_seconds, stage_cost
from confidantd.planner.memory import stage_memory
from confidantd.planner.simulate import LinkCost
from confidantd.planner.workload import Form, Workload

FORMS: tuple[Form, ...] = ("saved", "recompute")  # the faster one first


@dataclass(frozen=True, slots=True)
class Option:
    """Seconds of a microbatch (or token) with some number of layers and its part of the
    optimizer's, those of its forward, and the form that fits.
    """

    seconds: float
    forward: float
    form: Form


class Options:
    """Options of every device at every place of a pipeline of `stages`, and its links.

    A stage is saved where that fits, else recomputing; neither: it cannot hold so many layers.
    """

    def __init__(self, work: Workload, devices: Sequence[PlanDevice], stages: int) -> None:
        self._work, self._devices, self._stages = work, devices, stages
        self._most = work.layers - stages + 1
        self.at = functools.cache(self._at)
        self.link = functools.cache(self._link)

    def _at(self, device: int, place: int) -> tuple[Option, ...]:
        """Options for 1, 2, ... layers, as many as fit; never faster with more of them."""
        holder, head, embedding = self._devices[device], place == self._stages - 1, place == 0
        found: list[Option] = []
        for form in FORMS:
            fit = self._fitting(holder, place, form)
            for layers in range(len(found) + 1, fit + 1):
                cost = stage_cost(
                    self._work, holder, layers, head=head, embedding=embedding, form=form
                )
                found.append(Option(microbatch_seconds(self._work, cost), cost.forward, form))
        return tuple(found)

    def _fitting(self, device: PlanDevice, place: int, form: Form) -> int:
        """Most layers that fit; memory grows with every layer."""

        def memory_of(layers: int) -> int:
            return stage_memory(
                self._work, layers, embedding=place == 0, head=place == self._stages - 1,
                stage=place, stages=self._stages, form=form,
            ).total  # fmt: skip

        possible = range(1, self._most + 1)
        return bisect.bisect_right(possible, device.available_bytes, key=memory_of)

    def _link(self, first: int, second: int) -> LinkCost:
        return link_cost(self._work, self._devices[first], self._devices[second])
