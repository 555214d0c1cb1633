"""Whether a generating stage runs as one program, or shares its blocks out over backends."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.generation.stage import FusedStage, GeneratingStage
from confidantd.engine.split.decode_stage import SplitStage
from confidantd.engine.split.team import Report
from confidantd.wire.stage import BackendShare, StageSpec
from confidantd.wire.worker import SplitChosen

PAST_POSITIONS = 32
ROUNDS = 5
TRIAL = -1  # a sequence that no job has


def faster(
    spec: StageSpec, fused: FusedStage, shared: SplitStage, report: Report
) -> GeneratingStage:
    """The one that takes less for a token, both measured in turn; the other one is closed."""
    stages: tuple[GeneratingStage, ...] = (fused, shared)
    times: list[list[float]] = [[], []]
    for stage in stages:
        stage.forward([TRIAL], _some(spec, PAST_POSITIONS))
    for _ in range(1 + ROUNDS):
        for index, stage in enumerate(stages):
            started = time.perf_counter()
            stage.forward([TRIAL], _some(spec, 1))
            times[index].append(time.perf_counter() - started)
            stage.truncate(TRIAL, PAST_POSITIONS)
    for stage in stages:
        stage.release(TRIAL)
    seconds = [statistics.median(found[1:]) for found in times]
    if seconds[1] < seconds[0]:
        fused.close()
        return shared
    shared.close()
    block = spec.model.block
    layers = max(1, spec.past_last_layer - spec.first_layer)
    whole = (BackendShare(CpuBackend.name, block.heads, block.columns),)
    report.chosen(SplitChosen(whole, seconds[0] / layers))
    return fused


def _some(spec: StageSpec, positions: int) -> NDArray[Any]:
    """Tokens or hidden states."""
    if spec.embedding:
        return np.zeros((1, positions), np.int64)
    shape = (1, positions, spec.model.block.hidden)
    return np.random.default_rng(0).standard_normal(shape, np.float32)
