"""The LM head's loss and gradients over tokens that backends share out.

Losses and the gradients of weights add up over tokens, so each backend takes some tokens
of a microbatch. Which way is fastest is measured once, when the stage is loaded.
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
from confidantd.engine.head import TABLE, HeadPass, flat, next_tokens, table_sum
from confidantd.engine.program import EngineProgram
from confidantd.engine.split.choice import Memory
from confidantd.engine.split.head_ways import Way, best_way, remembered_seconds, to_json, ways_of
from confidantd.engine.split.parts import BackendPrograms
from confidantd.engine.split.proof import Sampled, check, sampled
from confidantd.engine.split.team import NO_COUNT, Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.models.parts import TOKENS
from confidantd.planner.memory import head_chunk
from confidantd.wire.stage import StageSpec

UNIT = "head"
PROGRAM = f"{UNIT}_backward"
ROUNDS = 2
BUDGET_SECONDS = 60.0

Array = NDArray[Any]


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
        self._vocabulary, self._form = spec.model.vocabulary, spec.form
        ways = tuple(
            way
            for way in ways_of(spec.microbatch_size * spec.sequence_length, team.names)
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
            if way != _on_cpu(way):
                check("head", results, right)
            for _ in range(ROUNDS):
                started = time.perf_counter()
                self._results(way, spec, head)
                times.append(time.perf_counter() - started)
        except BackendError:
            if way == _on_cpu(way):
                raise
            return None
        finally:  # the programs of all ways would take several times the memory of the head
            team.drop_parts()
            for name in team.names:
                team.whole(name).drop_all_but({UNIT: NO_COUNT})
        return statistics.median(times)

    def _results(self, way: Way, spec: StageSpec, head: Group) -> Sampled:
        """Samples of what one run on random tokens gives."""
        shape = (spec.microbatch_size * spec.sequence_length, spec.model.block.hidden)
        generator = np.random.default_rng(0)
        x = generator.standard_normal(shape, np.float32)
        wanted = generator.integers(0, spec.model.vocabulary, shape[0])
        try:
            _, dx = self._run(way, x, wanted, np.array(1.0, np.float32), head)
            found = {n: t.gradient for n, t in head.trained.items() if t.gradient is not None}
            return sampled({"dx": dx, **found})
        finally:
            for trained in head.trained.values():
                trained.clear()

    def run(self, x: Floats, labels: Array, scale: Array, head: Group) -> tuple[float, Floats]:
        """Scaled loss of hidden states x [b, S, D] and labels [b, S], and its gradient by x;
        adds to the gradients of the weights.
        """
        if any(name in self._team.left_out for name, _ in self._way.shares):
            self._way = _on_cpu(self._way)
        loss, dx = self._run(self._way, flat(x), next_tokens(labels), scale, head, again=True)
        return loss, dx.reshape(x.shape)

    def _run(
        self,
        way: Way,
        x: Floats,
        wanted: Array,
        scale: Array,
        head: Group,
        *,
        again: bool = False,
    ) -> tuple[float, Floats]:
        """One run; with `again` the CPU does the rest of a backend that fails."""
        dx = np.empty_like(x)
        pieces = self._pieces(way, x, wanted, scale, dx, head)
        running = [self._start(piece, way, head) for piece in pieces]
        wait(running)  # none may still compute when another one is done again
        for future, piece in zip(running, pieces, strict=True):
            self._finish(future, piece, head, again=again)
        for piece in pieces:
            head.add_gradients(piece.work.gradients)
            if piece.own_table is not None:
                head.trained[TABLE].add(piece.own_table)
        return sum(piece.work.loss for piece in pieces), dx

    def _pieces(
        self, way: Way, x: Floats, wanted: Array, scale: Array, dx: Floats, head: Group
    ) -> list[Piece]:
        """The first one adds to the gradient of the table in place, the others to their own."""
        ends = [0, *itertools.accumulate(count for _, count in way.shares)]
        whole, found = table_sum(head), list[Piece]()
        for (name, count), first in zip(way.shares, ends[:-1], strict=True):
            if count:
                part = slice(first, first + count)
                own = np.zeros_like(whole) if found and whole is not None else None
                size = head_chunk(count, self._vocabulary, self._form)
                work = HeadPass(
                    size, x[part], wanted[part], scale, dx[part], whole if own is None else own
                )
                found.append(Piece(name, size, work, own))
        return found

    def _start(self, piece: Piece, way: Way, head: Group) -> Future[tuple[HeadPass, float]]:
        """On the backend's thread; one that works alone runs here, where all cores are its."""
        team = self._team
        if not way.alone:
            programs = team.parts(piece.name)
            return team.thread(piece.name).start(
                lambda: _program(programs, piece),
                lambda program: piece.work.run(program, head.weights),
            )
        done: Future[tuple[HeadPass, float]] = Future()
        try:
            program = _program(team.whole(piece.name), piece)
            done.set_result((piece.work.run(program, head.weights), 0.0))
        except BackendError as failure:
            done.set_exception(failure)
        return done

    def _finish(
        self, future: Future[tuple[HeadPass, float]], piece: Piece, head: Group, *, again: bool
    ) -> None:
        try:
            future.result()
        except BackendError as failure:
            if not again or piece.name == CpuBackend.name:
                raise
            self._team.leave_out(piece.name, failure)
            piece.work.run(_program(self._team.cpu, piece), head.weights)


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one backend, `size` at a time, and its own sum of the table's gradient."""

    name: str
    size: int
    work: HeadPass
    own_table: Floats | None


def _program(programs: BackendPrograms, piece: Piece) -> EngineProgram:
    return programs.get(PROGRAM, TOKENS, piece.size)


def _on_cpu(way: Way) -> Way:
    """All tokens on the CPU alone."""
    return Way(((CpuBackend.name, sum(count for _, count in way.shares)),), alone=True)
