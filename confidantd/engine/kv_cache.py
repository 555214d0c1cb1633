"""The keys and values of one sequence in the blocks of one stage."""

from __future__ import annotations

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.models.spec import BlockSpec

_FIRST_CAPACITY = 64  # positions; then a quarter more each time, so at most a fifth is unused


class SequenceCache:
    """Buffers [1, K, C, d] per block, of which the first `length` positions are valid.

    Positions that are there from the start are zeros.
    """

    def __init__(self, block: BlockSpec, length: int = 0) -> None:
        self.length = length
        capacity = max(_FIRST_CAPACITY, length + 1)
        self._shape = (1, block.kv_heads, capacity, block.head_dim)
        self._keys: list[Floats] = []
        self._values: list[Floats] = []

    def buffers(self, layer: int) -> tuple[Floats, Floats]:
        """Keys and values of a block; what lies behind the valid positions is finite."""
        while len(self._keys) <= layer:
            self._keys.append(np.zeros(self._shape, np.float32))
            self._values.append(np.zeros(self._shape, np.float32))
        return self._keys[layer], self._values[layer]

    def append(self, layer: int, key: Floats, value: Floats, first_group: int = 0) -> None:
        """Put new positions [1, k, T, d] of k head groups behind the valid ones; `length` is
        not changed, so that every block and part of a step sees the same one.
        """
        self._keys[layer] = self._put(self._keys[layer], key, first_group)
        self._values[layer] = self._put(self._values[layer], value, first_group)

    def _put(self, buffer: Floats, new: Floats, first_group: int) -> Floats:
        end, past_last_group = self.length + new.shape[2], first_group + new.shape[1]
        if end > buffer.shape[2]:
            rows, heads, capacity, size = buffer.shape
            grown = np.zeros((rows, heads, max(end, capacity + capacity // 4), size), np.float32)
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = grown
        buffer[:, first_group:past_last_group, self.length : end] = new
        return buffer

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))
