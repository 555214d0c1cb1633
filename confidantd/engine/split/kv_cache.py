"""The keys and values of one sequence in the blocks of one stage."""

from __future__ import annotations

import copy

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

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._shape[2]

    def reserve(self, length: int) -> None:
        """Make room for so many positions in all blocks; what is valid stays."""
        if length > self.capacity:
            rows, heads, capacity, size = self._shape
            self._shape = (rows, heads, max(length, capacity + capacity // 4), size)
            for buffers in (self._keys, self._values):
                for layer, buffer in enumerate(buffers):  # one at a time is there twice
                    buffers[layer] = self._grown(buffer)

    def _grown(self, buffer: Floats) -> Floats:
        grown = np.zeros(self._shape, np.float32)
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def beginning(self, length: int) -> SequenceCache:
        """Another cache with the first `length` positions."""
        return copy.deepcopy(self).cut(length)

    def cut(self, length: int) -> SequenceCache:
        """Forget what lies behind the first `length` positions."""
        self.length = min(self.length, length)
        return self

    def append(self, layer: int, key: Floats, value: Floats, first_group: int = 0) -> None:
        """Put new positions [1, k, T, d] of k head groups behind the valid ones; `length` is
        not changed, so that every block and part of a step sees the same one.
        """
        end = self.length + key.shape[2]
        self.reserve(end)
        past_last_group = first_group + key.shape[1]
        for buffer, new in zip(self.buffers(layer), (key, value), strict=True):
            buffer[:, first_group:past_last_group, self.length : end] = new

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))
