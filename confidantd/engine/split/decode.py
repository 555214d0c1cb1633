"""Blocks in generation whose attention and MLP run in parts on several backends at once.

A part attends over the keys and values of its own head groups. They are a slice of the
sequence's cache, which stays in the host's memory: so shares may change between any two
blocks, and where a backend fails the CPU goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from confidantd.engine.split.blocks import ATTENTION, MLP, Failed, Part, Parts, joined
from confidantd.engine.split.decode_blocks import position
from confidantd.engine.split.kv_cache import SequenceCache
from confidantd.engine.split.parts import BackendPrograms
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group

ATTENTION_PROGRAM, MLP_PROGRAM = f"{ATTENTION}_decode", f"{MLP}_decode"


class SplitDecode:
    """A `DecodeRunner` over parts. `failed` hears of backends that were replaced."""

    def __init__(self, parts: Sequence[Part], fallback: BackendPrograms, failed: Failed) -> None:
        self._parts = Parts(parts, fallback, failed)

    @property
    def seconds(self) -> dict[tuple[int, str], float]:
        """Of the last runs by (part, program)."""
        return self._parts.seconds

    def forward(self, x: Floats, layer: int, block: Group, cache: SequenceCache) -> Floats:
        """Attention parts, their sum, MLP parts, their sum."""
        feeds = [_attention_feeds(part, x, layer, cache) for part in self._parts]
        found = self._parts.run(ATTENTION_PROGRAM, block, feeds)
        for part, outputs in zip(self._parts, found, strict=True):
            if outputs:
                first = part.shares[ATTENTION].first
                cache.append(layer, outputs["key"], outputs["value"], first)
        middle = joined(x, found, "y")
        found = self._parts.run(MLP_PROGRAM, block, [{"x": middle}] * len(self._parts))
        return joined(middle, found, "y")


def _attention_feeds(
    part: Part, x: Floats, layer: int, cache: SequenceCache
) -> dict[str, NDArray[Any]]:
    """Nothing for a part without attention."""
    share = part.shares.get(ATTENTION)
    if share is None:
        return {}
    key, value = (buffer[:, share.first : share.past_last] for buffer in cache.buffers(layer))
    return {"x": x, "past_key": key, "past_value": value, "past": position(cache)}
