"""Whether a generating stage runs as one program, or shares its blocks out over backends."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.generation.stage import GeneratingStage
from confidantd.engine.split.team import Report
from confidantd.wire.stage import BackendShare, StageSpec
from confidantd.wire.worker import SplitChosen

PAST_POSITIONS = 32
ROUNDS = 5
TRIAL = -1  # a sequence that no job has


def faster(
    spec: StageSpec,
    make_fused: Callable[[], GeneratingStage],
    make_shared: Callable[[], GeneratingStage],
    report: Report,
) -> GeneratingStage:
    """The one that takes less for a token. One is there at a time: memory is granted for one."""
    fused = make_fused()
    fused_seconds = token_seconds(fused, spec)
    fused.close()
    del fused
    shared = make_shared()
    if token_seconds(shared, spec) < fused_seconds:
        return shared
    shared.close()
    del shared
    block = spec.model.block
    layers = max(1, spec.past_last_layer - spec.first_layer)
    whole = (BackendShare(CpuBackend.name, block.heads, block.columns),)
    report.chosen(SplitChosen(whole, fused_seconds / layers))
    return make_fused()


def token_seconds(stage: GeneratingStage, spec: StageSpec) -> float:
    """Of one token after some others; the first run also fills memory."""
    stage.forward([TRIAL], _some(spec, PAST_POSITIONS))
    times = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        stage.forward([TRIAL], _some(spec, 1))
        times.append(time.perf_counter() - started)
        stage.truncate(TRIAL, PAST_POSITIONS)
    stage.release(TRIAL)
    return statistics.median(times[1:])


def _some(spec: StageSpec, positions: int) -> NDArray[Any]:
    """Tokens or hidden states."""
    if spec.embedding:
        return np.zeros((1, positions), np.int64)
    shape = (1, positions, spec.model.block.hidden)
    return np.random.default_rng(0).standard_normal(shape, np.float32)
