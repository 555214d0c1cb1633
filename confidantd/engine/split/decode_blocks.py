"""Running one block of a generating stage: what all ways have in common, and the simplest way."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.program import EngineProgram
from confidantd.engine.split.kv_cache import SequenceCache
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group

BLOCK_PROGRAM = "block_decode"


class DecodeRunner(Protocol):
    """Computes any block of a stage from its weights and the cache of a sequence."""

    def forward(self, x: Floats, layer: int, block: Group, cache: SequenceCache) -> Floats:
        """The output [1, T, D] of the stage's block number `layer` at the T positions x that
        follow those in the cache; appends their keys and values.
        """
        ...


class FusedDecode:
    """Whole blocks on one backend."""

    def __init__(self, program: EngineProgram) -> None:
        self._program = program

    def forward(self, x: Floats, layer: int, block: Group, cache: SequenceCache) -> Floats:
        """One program."""
        key, value = cache.buffers(layer)
        feeds = {"x": x, "past_key": key, "past_value": value, "past": position(cache)}
        found = self._program.run(feeds, block.weights)
        cache.append(layer, found["key"], found["value"])
        return found["y"]


def position(cache: SequenceCache) -> NDArray[Any]:
    """The number of valid positions as programs take it."""
    return np.array(cache.length, np.int64)
