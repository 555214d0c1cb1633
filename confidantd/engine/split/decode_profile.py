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

from confidantd.engine.decode_blocks import BLOCK_PROGRAM, DecodeRunner, FusedDecode
from confidantd.engine.kv_cache import SequenceCache
from confidantd.engine.split.blocks import ATTENTION, MLP
from confidantd.engine.split.decode import ATTENTION_PROGRAM, SplitDecode
from confidantd.engine.split.plan import make_parts
from confidantd.engine.split.profile import Samples, Shares, compositions, placement_of
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


def measure_decode(
    bench: DecodeBench, team: Team, report: Report, least_seconds: float
) -> BlockProfile:
    """Whole blocks on every backend, and shares unless a block takes under `least_seconds`.

    A backend that fails is left out.
    """
    profile = BlockProfile(_rounds(bench, team, report, (), Samples()), None)
    if min(alone.seconds for alone in profile.alone) < least_seconds:
        return profile
    while team.can_split(ATTENTION_PROGRAM):
        before, samples = len(team.left_out), Samples()
        alone = _rounds(bench, team, report, _runners(bench, team), samples)
        if len(team.left_out) == before:
            return BlockProfile(alone, _curves(samples, team.names))
    return profile.without(team.left_out)


def _rounds(
    bench: DecodeBench,
    team: Team,
    report: Report,
    made: Sequence[tuple[Shares, SplitDecode]],
    samples: Samples,
) -> tuple[Alone, ...]:
    """Whole blocks on each backend, the others idle, and in between shares on all at once.

    In turn, so that what disturbs the machine for a while spoils no comparison.
    """
    layers, total = range(len(bench.blocks)), (1 + ROUNDS) * len(made)
    alone: dict[str, list[float]] = {name: [] for name in team.names}
    for index in range(1 + ROUNDS):
        for name in team.names:
            seconds = _whole(bench, team, name)
            alone[name] += seconds if index else []
        for done, (shares, runner) in enumerate(made, index * len(made)):
            report.measuring(done + 1, total)
            for layer in layers:
                wall_seconds = bench.time(runner, layer)
                if index:
                    samples.record(runner, shares, wall_seconds)
    return tuple(Alone(name, statistics.median(alone[name]), 0.0) for name in team.names)


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


def _runners(bench: DecodeBench, team: Team) -> list[tuple[Shares, SplitDecode]]:
    """One for each composition to measure."""
    model, names = bench.spec.model, team.names
    programs, threads = [team.parts(n) for n in names], [team.thread(n) for n in names]
    made = []
    for shares in compositions(bench.spec, len(names)):
        placement = placement_of(shares, model.block.columns)
        parts = make_parts(model, None, programs, threads, placement)
        made.append((shares, SplitDecode(parts, team.cpu, team.leave_out)))
    return made


def _curve(samples: Samples, index: int, name: str, unit: str) -> Curve:
    """Seconds of a backend's parts, with the join in each: a unit has one, whoever computes it."""
    join = samples.join_seconds()
    found = samples.medians(index, f"{unit}_decode")
    return Curve(name, tuple((n, s + join) for n, s in sorted(found.items())), NO_BACKWARD)
