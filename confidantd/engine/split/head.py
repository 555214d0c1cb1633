"""The LM head's loss and gradients over rows that backends share out.

Losses and the gradients of weights add up over sequences, so each backend takes some
rows of a microbatch. Which way is fastest is measured once, when the stage is loaded.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.config import Split
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.program import EngineProgram
from confidantd.engine.split.choice import Memory
from confidantd.engine.split.head_ways import Way, best_way, remembered_seconds, to_json, ways_of
from confidantd.engine.split.parts import BackendPrograms
from confidantd.engine.split.proof import Sampled, check, sampled
from confidantd.engine.split.team import NO_COUNT, Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.models.parts import ROWS
from confidantd.wire.stage import StageSpec

UNIT = "head"
PROGRAM = f"{UNIT}_backward"
ROUNDS = 2
BUDGET_SECONDS = 60.0

Array = NDArray[Any]
Outputs = dict[str, Array]


class SplitHead:
    """Runs the head's backward; the CPU does again what a failing backend should have done.

    Ways are measured the first time, and remembered. `split` as in `Load`: `never` compares
    whole heads only.
    """

    def __init__(
        self,
        spec: StageSpec,
        head: Group,
        team: Team,
        memory: Memory,
        report: Report,
        split: Split = "auto",
    ) -> None:
        self._team = team
        ways = tuple(
            way
            for way in ways_of(spec.microbatch_size, team.names)
            if way.alone or team.can_split(PROGRAM)
        )
        right = self._results(ways[0], spec, head)
        seconds = remembered_seconds(memory, ways)
        if seconds is None:
            seconds = self._measured(ways, spec, head, right, report)
            memory.write(to_json(ways, seconds))
        self._way = best_way(ways, seconds, split)
        if self._way != ways[0] and not self._is_right(self._way, spec, head, right):
            self._way = ways[0]  # it was right under another driver

    def _measured(
        self,
        ways: Sequence[Way],
        spec: StageSpec,
        head: Group,
        right: Sampled,
        report: Report,
    ) -> list[float | None]:
        """Seconds of each way; None where one failed, or time was up."""
        found: list[float | None] = []
        began = time.perf_counter()
        for done, way in enumerate(ways):
            report.measuring(done, len(ways))
            in_time = way == ways[0] or time.perf_counter() - began < BUDGET_SECONDS
            found.append(self._measure(way, spec, head, right) if in_time else None)
        report.measuring(len(ways), len(ways))
        return found

    def _is_right(self, way: Way, spec: StageSpec, head: Group, right: Sampled) -> bool:
        try:
            check("head", self._results(way, spec, head), right)
        except BackendError:
            return False
        return True

    def _measure(self, way: Way, spec: StageSpec, head: Group, right: Sampled) -> float | None:
        """Seconds of one run; None where a backend failed, or what it gave is not `right`."""
        team, times = self._team, []
        try:
            results = self._results(way, spec, head)
            if way.shares[0] != (CpuBackend.name, spec.microbatch_size):
                check("head", results, right)
            for _ in range(ROUNDS):
                started = time.perf_counter()
                self._results(way, spec, head)
                times.append(time.perf_counter() - started)
        except BackendError:
            if way.shares[0] == (CpuBackend.name, spec.microbatch_size):
                raise
            return None
        finally:  # the programs of all ways would take several times the memory of the head
            team.drop_parts()
            for name in team.names:
                team.whole(name).drop_all_but({UNIT: NO_COUNT})
        return statistics.median(times)

    def _results(self, way: Way, spec: StageSpec, head: Group) -> Sampled:
        """Samples of what one run on random tokens gives."""
        shape = (spec.microbatch_size, spec.sequence_length, spec.model.block.hidden)
        generator = np.random.default_rng(0)
        x = generator.standard_normal(shape, np.float32)
        labels = generator.integers(0, spec.model.vocabulary, shape[:2])
        try:
            _, dx = self._run(way, x, labels, np.array(1.0, np.float32), head)
            found = {n: t.gradient for n, t in head.trained.items() if t.gradient is not None}
            return sampled({"dx": dx, **found})
        finally:
            for trained in head.trained.values():
                trained.clear()

    def run(self, x: Floats, labels: Array, scale: Array, head: Group) -> tuple[float, Floats]:
        """Scaled loss, and its gradient by x [b, S, D]; adds to the gradients of the weights."""
        if any(name in self._team.left_out for name, _ in self._way.shares):
            rows = sum(rows for _, rows in self._way.shares)
            self._way = Way(((CpuBackend.name, rows),), alone=True)
        return self._run(self._way, x, labels, scale, head, again=True)

    def _run(
        self,
        way: Way,
        x: Floats,
        labels: Array,
        scale: Array,
        head: Group,
        *,
        again: bool = False,
    ) -> tuple[float, Floats]:
        """One run; with `again` the CPU repeats the rows of a backend that fails."""
        pieces = _pieces(way, x, labels, scale, np.empty_like(x))
        targets = head.gradient_targets()
        running = []
        for index, piece in enumerate(pieces):
            # the first one writes this step's first gradients in place, the others' are added
            running.append(self._start(piece, way, head, {} if index else targets))
        wait(running)  # none may still compute when another one is done again
        found = [
            self._result(future, piece, head, {} if index else targets, again=again)
            for index, (future, piece) in enumerate(zip(running, pieces, strict=True))
        ]
        for outputs in found:
            head.add_gradients(outputs)
        return float(sum(float(outputs["loss"]) for outputs in found)), pieces[0].whole

    def _start(
        self, piece: Piece, way: Way, head: Group, targets: Outputs
    ) -> Future[tuple[Outputs, float]]:
        """On the backend's thread; one that works alone runs here, where all cores are its."""
        team = self._team
        if not way.alone:
            programs = team.parts(piece.name)
            return team.thread(piece.name).start(
                lambda: _program(programs, piece),
                lambda program: _compute(program, piece, head, targets),
            )
        done: Future[tuple[Outputs, float]] = Future()
        try:
            program = _program(team.whole(piece.name), piece)
            done.set_result((_compute(program, piece, head, targets), 0.0))
        except BackendError as failure:
            done.set_exception(failure)
        return done

    def _result(
        self,
        future: Future[tuple[Outputs, float]],
        piece: Piece,
        head: Group,
        targets: Outputs,
        *,
        again: bool,
    ) -> Outputs:
        try:
            return future.result()[0]
        except BackendError as failure:
            if not again or piece.name == CpuBackend.name:
                raise
            self._team.leave_out(piece.name, failure)
            return _compute(_program(self._team.cpu, piece), piece, head, targets)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one backend: what it is fed, and where its part of the gradient by x goes."""

    name: str
    feeds: Outputs
    dx: Floats
    whole: Floats  # the gradient by x of all rows


def _pieces(way: Way, x: Floats, labels: Array, scale: Array, dx: Floats) -> list[Piece]:
    ends = [0, *itertools.accumulate(rows for _, rows in way.shares)]
    found = []
    for (name, rows), first in zip(way.shares, ends[:-1], strict=True):
        if rows:
            part = slice(first, first + rows)
            feeds = {"x": x[part], "labels": labels[part], "scale": scale}
            found.append(Piece(name, feeds, dx[part], dx))
    return found


def _program(programs: BackendPrograms, piece: Piece) -> EngineProgram:
    return programs.get(PROGRAM, ROWS, len(piece.dx))


def _compute(program: EngineProgram, piece: Piece, head: Group, targets: Outputs) -> Outputs:
    """Losses and gradients of one piece."""
    return program.run(piece.feeds, head.weights, into={"dx": piece.dx, **targets})
