"""A generating stage is one program or shared out, whichever takes less for a token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from confidantd.engine.split.fastest import faster
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.wire.stage import BackendShare, StageSpec
from tests.component.split_support import Heard
from tests.unit.model_files import LLAMA

SLOW_SECONDS = 0.01
MODEL = spec_from_config(Config(LLAMA, "config.json"))


class Stage:
    """Takes as long as it is told; knows how many of its kind are open."""

    open_now: int = 0

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind, self._seconds = kind, seconds
        self.sequences: set[int] = set()
        Stage.open_now += 1
        assert Stage.open_now == 1, "memory is granted for one"

    def forward(self, sequences: Sequence[int], x: NDArray[Any]) -> NDArray[np.float32]:
        """Nothing, after a while."""
        time.sleep(self._seconds)
        self.sequences |= set(sequences)
        return np.zeros((len(x), 1), np.float32)

    def truncate(self, sequence: int, length: int) -> None:
        """It holds nothing."""

    def release(self, sequence: int) -> None:
        """As a stage does."""
        self.sequences.remove(sequence)

    def resident_bytes(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """One less."""
        Stage.open_now -= 1


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("fastest", ["fused", "shared"])
def test_the_faster_one_is_used(fastest: str, embedding: bool) -> None:
    """Only one is there at a time, and it has no sequence afterwards; who computes is told."""
    Stage.open_now = 0
    seconds = {"fused": SLOW_SECONDS, "shared": SLOW_SECONDS} | {fastest: 0.0}
    heard, spec = Heard(), StageSpec(MODEL, 0, 1, embedding, False, None)
    found = faster(
        spec,
        lambda: Stage("fused", seconds["fused"]),
        lambda: Stage("shared", seconds["shared"]),
        heard,
    )
    assert isinstance(found, Stage)
    assert found.kind == fastest
    assert Stage.open_now == 1
    assert not found.sequences
    whole = (BackendShare("cpu", MODEL.block.heads, MODEL.block.columns),)
    assert [split.shares for split in heard.chosen_splits] == (
        [whole] if fastest == "fused" else []
    )
