"""Measures what each backend takes for whole blocks and for shares of them, on one real block.

Shares are measured together, as they will run: backends slow each other down on shared
caches, memory and cores, and a curve measured alone would promise too much.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.blocks import BlockRunner
from confidantd.engine.split.blocks import ATTENTION, MLP, SplitBlocks
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.engine.split.proof import Sampled, check, sampled, wrong_ones
from confidantd.engine.split.samples import Samples, Shares
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.planner.heads import Alone, probes, tiles
from confidantd.planner.split_choice import BlockCurves, BlockProfile
from confidantd.wire.stage import StageSpec

LEAST_BLOCK_SECONDS = 0.004  # forward and backward; below this, waking threads costs too much
BUDGET_SECONDS = 60.0
ROUNDS = 3  # the median of so many; the first run of a session also compiles and is not counted


@dataclass(frozen=True, slots=True)
class Bench:
    """One real block and random tokens to measure on; gradients are dropped afterwards."""

    spec: StageSpec
    block: Group
    x: Floats
    dy: Floats

    @classmethod
    def of(cls, spec: StageSpec, block: Group) -> Bench:
        """Tokens of the stage's shape."""
        generator = np.random.default_rng(0)
        shape = (spec.microbatch_size * spec.sequence_length, spec.model.block.hidden)
        x = generator.standard_normal(shape, np.float32)
        return cls(spec, block, x, np.ascontiguousarray(x[::-1]))

    def time(self, runner: BlockRunner) -> tuple[float, float]:
        """Seconds of one forward and one backward."""
        started = time.perf_counter()
        _, saved = runner.forward(self.x, self.block, keep=self.spec.form == "saved")
        between = time.perf_counter()
        runner.backward(self.dy, self.x, saved, self.block)
        ended = time.perf_counter()
        self._forget()
        return between - started, ended - between

    def results(self, runner: BlockRunner) -> Sampled:
        """Samples of the output and of every gradient."""
        y, saved = runner.forward(self.x, self.block, keep=self.spec.form == "saved")
        dx = runner.backward(self.dy, self.x, saved, self.block)
        trained = {n: t.gradient for n, t in self.block.trained.items() if t.gradient is not None}
        found = sampled({"y": y, "dx": dx, **trained})
        self._forget()
        return found

    def _forget(self) -> None:
        for trained in self.block.trained.values():
            trained.clear()


def measure(bench: Bench, team: Team, report: Report, *, always: bool = False) -> BlockProfile:
    """Whole blocks on every backend, then shares where that can pay, or `always`.

    A backend that fails, or computes something else than the CPU's, is left out.
    """
    right = bench.results(team.fused(CpuBackend.name))
    alone = []
    for done, name in enumerate(team.names):
        report.measuring(done, len(team.names))
        if (found := _alone(bench, team, name, right)) is not None:
            alone.append(found)
    profile = BlockProfile(tuple(alone), None)
    if min(a.seconds for a in alone) < LEAST_BLOCK_SECONDS and not always:
        return profile
    while team.can_split(f"{ATTENTION}_forward"):
        before = len(team.left_out)
        team.drop_whole()
        curves = measure_together(bench, team, report, min(a.seconds for a in alone), right)
        if len(team.left_out) == before:
            return BlockProfile(profile.without(team.left_out).alone, curves)
    return profile.without(team.left_out)


def _alone(bench: Bench, team: Team, name: str, right: Sampled) -> Alone | None:
    """The whole block on one backend, the others idle."""
    try:
        runner = team.fused(name)
        if name != CpuBackend.name:
            check(name, bench.results(runner), right)
        bench.time(runner)
        times = [bench.time(runner) for _ in range(ROUNDS)]
    except BackendError as failure:
        if name == CpuBackend.name:
            raise
        team.leave_out(name, failure)
        return None
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    return Alone(name, forward, backward)


def measure_together(
    bench: Bench,
    team: Team,
    report: Report,
    block_seconds: float = 0.0,
    right: Sampled | None = None,
) -> BlockCurves:
    """Curves of every backend over groups and tiles of columns, all at work.

    `block_seconds`: about what a block takes; of slow ones fewer rounds are measured.
    `right`: what the block gives, to leave out a backend that computes something else.
    """
    samples, names = Samples(), team.names
    found = list(compositions(bench.spec, len(names)))
    affordable = int(BUDGET_SECONDS / max(len(found) * block_seconds, 1e-9)) - 1
    rounds = min(ROUNDS, max(1, affordable))
    for done, shares in enumerate(found):
        report.measuring(done, len(found))
        blocks = _blocks(bench, team, names, shares)
        if right is not None:
            leave_out_wrong(bench, team, names, shares, blocks, right)
        bench.time(blocks)
        for _ in range(rounds):
            samples.record(blocks, shares, sum(bench.time(blocks)))
        # the programs of all compositions would take several times the memory of a block
        team.drop_parts()
        if set(team.left_out) & set(names):
            break  # what was measured is of no use: it is measured again without it
    report.measuring(len(found), len(found))
    again = bench.spec.form == "recompute"
    return BlockCurves(
        tuple(samples.curve(i, n, ATTENTION, again=again) for i, n in enumerate(names)),
        tuple(samples.curve(i, n, MLP, again=again) for i, n in enumerate(names)),
        samples.join_seconds(),
    )


def leave_out_wrong(
    bench: Bench,
    team: Team,
    names: Sequence[str],
    shares: Shares,
    blocks: BlockRunner,
    right: Sampled,
) -> None:
    """Leave out whose shares of `blocks` come out wrong."""
    found = wrong_ones(
        names,
        lambda: bench.results(blocks),
        lambda name: bench.results(_blocks(bench, team, names, shares, name)),
        right,
    )
    for name, failure in found.items():
        team.leave_out(name, failure)


def _blocks(
    bench: Bench, team: Team, names: Sequence[str], shares: Shares, only: str = ""
) -> SplitBlocks:
    """Parts on backends by name, or on `only` one of them and the rest on the CPU."""
    spec = bench.spec
    programs = [team.parts(n) if only in ("", n) else team.cpu for n in names]
    threads = [team.thread(n) for n in names]
    placement = placement_of(shares, spec.model.block.columns)
    parts = make_parts(spec.model, spec.lora, programs, threads, placement)
    return SplitBlocks(parts, team.cpu, team.leave_out)


def compositions(spec: StageSpec, backends: int) -> Iterator[Shares]:
    """Compositions of both units to measure together; the shorter list is repeated."""
    block = spec.model.block
    groups = probes(block.kv_heads, backends)
    columns = probes(len(tiles(block.columns)), backends)
    count = max(len(groups), len(columns))
    both = zip(itertools.cycle(groups), itertools.cycle(columns), strict=False)
    for attention, mlp in itertools.islice(both, count):
        yield {ATTENTION: attention, MLP: mlp}


def placement_of(shares: Shares, columns: int) -> Placement:
    """Groups and tiles of each backend as groups and columns."""
    ends = [0, *itertools.accumulate(tiles(columns))]
    borders = [0, *itertools.accumulate(shares[MLP])]
    widths = tuple(ends[b] - ends[a] for a, b in itertools.pairwise(borders))
    return Placement({ATTENTION: shares[ATTENTION], MLP: widths})
