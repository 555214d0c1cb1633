"""Measures what each backend takes for blocks in generation and for shares of them.

What is measured is one new position, for that is what most of the time goes into. Its
products read every weight once, so blocks are run one after the other, as in a real
step: the weights then come from memory and not from a cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from confidantd.engine.split.blocks import ATTENTION, MLP
from confidantd.engine.split.decode import ATTENTION_PROGRAM, SplitDecode
from confidantd.engine.split.decode_blocks import BLOCK_PROGRAM, DecodeRunner, FusedDecode
from confidantd.engine.split.kv_cache import SequenceCache
from confidantd.engine.split.plan import make_parts
from confidantd.engine.split.profile import compositions, placement_of
from confidantd.engine.split.proof import Sampled, check, sampled, wrong_ones
from confidantd.engine.split.samples import Samples, Shares
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.planner.heads import Alone, Curve, Points
from confidantd.planner.split_choice import BlockCurves, BlockProfile
from confidantd.wire.stage import StageSpec

PAST_POSITIONS = 255
MOST_BLOCKS = 8  # of 20 MB and more: no cache of a small device holds them
ROUNDS = 3  # over all blocks; one before them makes the sessions and is not counted
NO_BACKWARD: Points = ((1, 0.0),)


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """Real blocks, a random position and a cache of `PAST_POSITIONS`."""

    spec: StageSpec
    blocks: Sequence[Group]
    x: Floats
    cache: SequenceCache

    @classmethod
    def of(cls, spec: StageSpec, blocks: Sequence[Group]) -> DecodeBench:
        """The first blocks of a stage."""
        x = np.random.default_rng(0).standard_normal((1, 1, spec.model.block.hidden), np.float32)
        cache = SequenceCache(spec.model.block, PAST_POSITIONS)
        return cls(spec, blocks[:MOST_BLOCKS], x, cache)

    def time(self, runner: DecodeRunner, layer: int) -> float:
        """Seconds of one block; the cache stays as long as it is."""
        started = time.perf_counter()
        runner.forward(self.x, layer, self.blocks[layer], self.cache)
        return time.perf_counter() - started

    def results(self, runner: DecodeRunner) -> Sampled:
        """Samples of what the first block gives and puts into the cache."""
        y = runner.forward(self.x, 0, self.blocks[0], self.cache)
        key, value = self.cache.buffers(0)
        return sampled({"y": y, "key": key, "value": value})


def measure_decode(
    bench: DecodeBench, team: Team, report: Report, least_seconds: float
) -> BlockProfile:
    """Whole blocks on every backend, and shares unless a block takes under `least_seconds`.

    A backend that fails, or computes something else than the CPU's, is left out.
    """
    right = bench.results(FusedDecode(team.cpu.get(BLOCK_PROGRAM)))
    _leave_out_wrong(bench, team, right)
    profile = BlockProfile(_alone(bench, team), None)
    if min(alone.seconds for alone in profile.alone) < least_seconds:
        return profile
    while team.can_split(ATTENTION_PROGRAM):
        before = len(team.left_out)
        found = _together(bench, team, report, right)
        if len(team.left_out) == before:
            return found
    return profile.without(team.left_out)


def _leave_out_wrong(bench: DecodeBench, team: Team, right: Sampled) -> None:
    for name in team.names[1:]:
        try:
            whole = FusedDecode(team.whole(name).get(BLOCK_PROGRAM))
            check(name, bench.results(whole), right)
        except BackendError as failure:
            team.leave_out(name, failure)


def _alone(bench: DecodeBench, team: Team) -> tuple[Alone, ...]:
    """Whole blocks on each backend, the others idle."""
    times: dict[str, list[float]] = {name: [] for name in team.names}
    for index in range(1 + ROUNDS):
        for name in times:
            found = _whole(bench, team, name)
            times[name] += found if index else []
    return tuple(Alone(name, statistics.median(times[name]), 0.0) for name in team.names)


def _together(bench: DecodeBench, team: Team, report: Report, right: Sampled) -> BlockProfile:
    """Shares on all backends at once, and in turn with them whole blocks on each alone.

    So what disturbs the machine for a while spoils no comparison. One composition after the
    other, since the programs of all would take several times the memory of a block.
    """
    samples, names = Samples(), team.names
    alone: dict[str, list[float]] = {name: [] for name in names}
    found = list(compositions(bench.spec, len(names)))
    for done, shares in enumerate(found):
        report.measuring(done, len(found))
        runner = _runner(bench, team, names, shares)
        leave_out_wrong(bench, team, names, shares, runner, right)
        for index in range(1 + ROUNDS):
            for name in names:
                seconds = _whole(bench, team, name)
                alone[name] += seconds if index else []
            for layer in range(len(bench.blocks)):
                wall_seconds = bench.time(runner, layer)
                if index:
                    samples.record(runner, shares, wall_seconds)
        team.drop_parts()
        if set(team.left_out) & set(names):
            break  # it is measured again without it
    report.measuring(len(found), len(found))
    whole = tuple(Alone(name, statistics.median(alone[name] or [0.0]), 0.0) for name in names)
    return BlockProfile(whole, _curves(samples, names))


def leave_out_wrong(
    bench: DecodeBench,
    team: Team,
    names: Sequence[str],
    shares: Shares,
    runner: DecodeRunner,
    right: Sampled,
) -> None:
    """Leave out whose shares of `runner` come out wrong."""
    found = wrong_ones(
        names,
        lambda: bench.results(runner),
        lambda name: bench.results(_runner(bench, team, names, shares, name)),
        right,
    )
    for name, failure in found.items():
        team.leave_out(name, failure)


def _whole(bench: DecodeBench, team: Team, name: str) -> list[float]:
    """Seconds of each block on one backend; none where that fails, which is left out then."""
    try:
        runner = FusedDecode(team.whole(name).get(BLOCK_PROGRAM))
        return [bench.time(runner, layer) for layer in range(len(bench.blocks))]
    except BackendError as failure:
        team.leave_out(name, failure)
        return []


def _curves(samples: Samples, names: Sequence[str]) -> BlockCurves:
    """Curves of every backend over groups and tiles of columns."""
    attention, mlp = (
        tuple(_curve(samples, i, name, unit) for i, name in enumerate(names))
        for unit in (ATTENTION, MLP)
    )
    return BlockCurves(attention, mlp, 0.0)


def _runner(
    bench: DecodeBench, team: Team, names: Sequence[str], shares: Shares, only: str = ""
) -> SplitDecode:
    """Parts on backends by name, or on `only` one of them and the rest on the CPU."""
    model = bench.spec.model
    programs = [team.parts(n) if only in ("", n) else team.cpu for n in names]
    threads = [team.thread(n) for n in names]
    parts = make_parts(model, None, programs, threads, placement_of(shares, model.block.columns))
    return SplitDecode(parts, team.cpu, team.leave_out)


def _curve(samples: Samples, index: int, name: str, unit: str) -> Curve:
    """Seconds of a backend's parts, with the join in each: a unit has one, whoever computes it."""
    join = samples.join_seconds()
    found = samples.medians(index, f"{unit}_decode")
    return Curve(name, tuple((n, s + join) for n, s in sorted(found.items())), NO_BACKWARD)
