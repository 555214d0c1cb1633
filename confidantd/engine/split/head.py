"""The LM head's loss and gradients over rows that backends share out.

Losses and the gradients of weights add up over sequences, so each backend takes some
rows of a microbatch. Which way is fastest is measured once, when the stage is loaded.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.split.team import Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.models.parts import ROWS
from confidantd.planner.heads import LEAST_GAIN
from confidantd.wire.stage import StageSpec

PROGRAM = "head_backward"
ROUNDS = 2
MOST_WAYS = 6  # compositions of rows that are measured

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Way:
    """Rows of each backend of the team; `alone`: one backend with all threads has them all."""

    rows: tuple[int, ...]
    alone: str | None = None


class SplitHead:
    """Runs the head's backward; a backend that fails is left out and the CPU does it again."""

    def __init__(self, spec: StageSpec, head: Group, team: Team) -> None:
        self._team = team
        self._way = Way((), CpuBackend.name)
        ways = list(_ways(spec.microbatch_size, team.names))
        measured = [(way, self._measure(way, spec, head)) for way in ways]
        worked = [(way, seconds) for way, seconds in measured if seconds is not None]
        alone = min((w for w in worked if w[0].alone), key=lambda w: w[1])
        best = min(worked, key=lambda w: w[1])
        self._way = best[0] if best[1] < (1 - LEAST_GAIN) * alone[1] else alone[0]

    def _measure(self, way: Way, spec: StageSpec, head: Group) -> float | None:
        """Seconds of one run; None where a backend failed."""
        shape = (spec.microbatch_size, spec.sequence_length, spec.model.block.hidden)
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        labels = np.ones(shape[:2], np.int64)
        times = []
        try:
            for _ in range(1 + ROUNDS):
                started = time.perf_counter()
                self._run(way, x, labels, np.array(1.0, np.float32), head)
                times.append(time.perf_counter() - started)
        except BackendError:
            return None  # it fails in the blocks too, which say so
        finally:
            for trained in head.trained.values():
                trained.clear()
        return statistics.median(times[1:])

    def run(self, x: Floats, labels: Array, scale: Array, head: Group) -> tuple[float, Floats]:
        """Scaled loss, and its gradient by x [b, S, D]; adds to the gradients of the weights."""
        try:
            return self._run(self._way, x, labels, scale, head)
        except BackendError as failure:
            for name in self._used():
                self._team.leave_out(name, failure)
            self._way = Way((), CpuBackend.name)
            return self._run(self._way, x, labels, scale, head)

    def _used(self) -> Iterator[str]:
        """Backends of the way other than the CPU."""
        pairs = zip(self._team.names, self._way.rows, strict=False)
        names = [self._way.alone] if self._way.alone else [name for name, rows in pairs if rows]
        return (name for name in names if name not in (None, CpuBackend.name))

    def _run(
        self, way: Way, x: Floats, labels: Array, scale: Array, head: Group
    ) -> tuple[float, Floats]:
        dx = np.empty_like(x)
        if way.alone:
            work = self._piece(way.alone, slice(None), x, labels, scale, head, dx, alone=True)
            return _added([work()], head), dx
        ends = [0, *itertools.accumulate(way.rows)]
        running: list[Future[tuple[dict[str, Array], float]]] = []
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        for name, part in zip(self._team.names, parts, strict=True):
            if part.stop > part.start:
                work = self._piece(name, part, x, labels, scale, head, dx, leads=not running)
                running.append(self._team.thread(name).start(work))
        found = [future.result()[0] for future in running]
        return _added(found, head), dx

    def _piece(
        self,
        name: str,
        part: slice,
        x: Floats,
        labels: Array,
        scale: Array,
        head: Group,
        dx: Floats,
        *,
        alone: bool = False,
        leads: bool = True,
    ) -> Callable[[], dict[str, Array]]:
        """The run of one backend over its rows."""
        programs = self._team.whole(name) if alone else self._team.parts(name)
        feeds = {"x": x[part], "labels": labels[part], "scale": scale}
        into = {"dx": dx[part]} | (head.gradient_targets() if leads else {})

        def work() -> dict[str, Array]:
            program = programs.get(PROGRAM, ROWS, len(feeds["x"]))
            return program.run(feeds, head.weights, into=into)

        return work


def _added(found: list[dict[str, Array]], head: Group) -> float:
    """Add every piece's gradients; gives the sum of their losses."""
    for outputs in found:
        head.add_gradients(outputs)
    return float(sum(float(outputs["loss"]) for outputs in found))


def _ways(rows: int, names: tuple[str, ...]) -> Iterator[Way]:
    """Each backend alone, then the more even compositions of two or more."""
    yield from (Way((), name) for name in names)
    cuts = itertools.combinations_with_replacement(range(rows + 1), len(names) - 1)
    found = [tuple(b - a for a, b in itertools.pairwise((0, *cut, rows))) for cut in cuts]
    shared = [shares for shares in found if sum(share > 0 for share in shares) > 1]
    shared.sort(key=lambda shares: sum(share * share for share in shares))
    yield from (Way(shares) for shares in shared[:MOST_WAYS])
