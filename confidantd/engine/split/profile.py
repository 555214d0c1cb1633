"""Measures what each backend takes for whole blocks and for shares of them, on one real block.

Shares are measured together, as they will run: backends slow each other down on shared
caches, memory and cores, and a curve measured alone would promise too much.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from confidantd.engine.blocks import BlockRunner
from confidantd.engine.split.blocks import ATTENTION, MLP, SplitBlocks
from confidantd.engine.split.decode import SplitDecode
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.planner.heads import Alone, Curve, probes, tiles
from confidantd.planner.split_choice import BlockCurves, BlockProfile
from confidantd.wire.stage import StageSpec

LEAST_BLOCK_SECONDS = 0.004  # forward and backward; below this, waking threads costs too much
BUDGET_SECONDS = 60.0
ROUNDS = 3  # the median of so many; the first run of a session also compiles and is not counted
Shares = Mapping[str, tuple[int, ...]]  # by unit: groups, or tiles of columns, of each backend


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
        for trained in self.block.trained.values():
            trained.clear()
        return between - started, ended - between


def measure(bench: Bench, team: Team, report: Report, *, always: bool = False) -> BlockProfile:
    """Whole blocks on every backend, then shares where that can pay, or `always`.

    A backend that fails is left out.
    """
    alone = [a for name in team.names if (a := _alone(bench, team, name)) is not None]
    profile = BlockProfile(tuple(alone), None)
    if min(a.seconds for a in alone) < LEAST_BLOCK_SECONDS and not always:
        return profile
    while team.can_split(f"{ATTENTION}_forward"):
        before = len(team.left_out)
        curves = measure_together(bench, team, report, min(a.seconds for a in alone))
        if len(team.left_out) == before:
            return BlockProfile(profile.without(team.left_out).alone, curves)
    return profile.without(team.left_out)


def _alone(bench: Bench, team: Team, name: str) -> Alone | None:
    """The whole block on one backend, the others idle."""
    try:
        runner = team.fused(name)
        bench.time(runner)
        times = [bench.time(runner) for _ in range(ROUNDS)]
    except BackendError as failure:
        team.leave_out(name, failure)
        return None
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    return Alone(name, forward, backward)


def measure_together(
    bench: Bench, team: Team, report: Report, block_seconds: float = 0.0
) -> BlockCurves:
    """Curves of every backend over groups and tiles of columns, all at work.

    `block_seconds`: about what a block takes; of slow ones fewer rounds are measured.
    """
    samples, names = Samples(), team.names
    programs, threads = [team.parts(n) for n in names], [team.thread(n) for n in names]
    made = []
    for shares in compositions(bench.spec, len(names)):
        placement = placement_of(shares, bench.spec.model.block.columns)
        parts = make_parts(bench.spec.model, bench.spec.lora, programs, threads, placement)
        made.append((shares, SplitBlocks(parts, team.cpu, team.leave_out)))
    affordable = int(BUDGET_SECONDS / max(len(made) * block_seconds, 1e-9)) - 1
    rounds = 1 + min(ROUNDS, max(1, affordable))  # the first one is not counted
    total = len(made) * rounds
    # round by round, so that what disturbs the machine for a while spoils one round only
    for done, (shares, blocks) in enumerate(made * rounds):
        report.measuring(done, total)
        seconds = sum(bench.time(blocks))
        if done >= len(made):
            samples.record(blocks, shares, seconds)
    report.measuring(total, total)
    again = bench.spec.form == "recompute"
    return BlockCurves(
        tuple(samples.curve(i, n, ATTENTION, again=again) for i, n in enumerate(names)),
        tuple(samples.curve(i, n, MLP, again=again) for i, n in enumerate(names)),
        samples.join_seconds(),
    )


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


class Samples:
    """Seconds of parts by backend, program and size of share, and what the joins took."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, str], dict[int, list[float]]] = {}
        self._joins: list[float] = []

    def record(
        self, blocks: SplitBlocks | SplitDecode, shares: Shares, wall_seconds: float
    ) -> None:
        """Take the seconds of the last run of each program."""
        slowest: dict[str, float] = {}
        for (index, program), seconds in blocks.seconds.items():
            size = shares[program.split("_")[0]][index]
            sizes = self._seconds.setdefault((index, program), {})
            sizes.setdefault(size, []).append(seconds)
            slowest[program] = max(slowest.get(program, 0.0), seconds)
        self._joins.append((wall_seconds - sum(slowest.values())) / max(1, len(slowest)))

    def join_seconds(self) -> float:
        """What a unit takes beyond its slowest part: waking threads and adding up."""
        return max(0.0, statistics.median(self._joins))

    def curve(self, index: int, name: str, unit: str, *, again: bool) -> Curve:
        """One backend's curve; with `again` the backward includes what is computed again."""
        forward = self.medians(index, f"{unit}_forward")
        backward = self.medians(index, f"{unit}_backward")
        if again:
            more = forward if unit == ATTENTION else self.medians(index, f"{unit}_recompute")
            backward = {size: s + more.get(size, 0.0) for size, s in backward.items()}
        return Curve(name, tuple(sorted(forward.items())), tuple(sorted(backward.items())))

    def medians(self, index: int, program: str) -> dict[int, float]:
        """Median seconds of one backend's runs of a program, by size of share."""
        found = self._seconds.get((index, program), {})
        return {size: statistics.median(seconds) for size, seconds in found.items()}
