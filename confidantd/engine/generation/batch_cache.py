"""The keys and values of sequences that are computed together, in the blocks of one stage."""

from __future__ import annotations

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.errors import ProtocolError

_FIRST_CAPACITY = 64  # positions; then a quarter more each time, so at most a fifth is unused


class BatchCache:
    """Buffers [R, K, C, d] per block, of which row i holds the first `lengths[i]` positions of
    `sequences[i]`. Rows behind the last sequence, and positions behind a length, are finite.
    """

    def __init__(self, blocks: int, kv_heads: int, width: int) -> None:
        self.sequences: list[int] = []
        self.lengths: list[int] = []
        self._shape = (0, kv_heads, _FIRST_CAPACITY, width)
        self._buffers = [np.zeros(self._shape, np.float32) for _ in range(2 * blocks)]
        self.version = 0  # another one: the buffers lie elsewhere, or have other rows

    def buffers(self) -> list[tuple[Floats, Floats]]:
        """Keys and values of each block, just of the rows that are used."""
        rows = len(self.sequences)
        used = [buffer[:rows] for buffer in self._buffers]
        return list(zip(used[0::2], used[1::2], strict=True))

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._shape[2]

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def length(self, sequence: int) -> int:
        """Positions of a sequence."""
        return self.lengths[self.sequences.index(sequence)]

    def add(self, sequence: int) -> None:
        """A new sequence of no positions, in a row behind the others."""
        self.sequences.append(sequence)
        self.lengths.append(0)
        self._resize(max(len(self.sequences), self._shape[0]), self._shape[2])
        self.version += 1

    def take(self, other: BatchCache, sequence: int) -> None:
        """Bring a sequence over from another cache, into a row behind the others."""
        self.copy(other, sequence, sequence, other.length(sequence))
        other.drop(sequence)

    def copy(self, other: BatchCache, source: int, sequence: int, length: int) -> None:
        """A new sequence with the first positions of a `source` in another cache, behind the
        others.
        """
        row = other.sequences.index(source)
        self.add(sequence)
        self.reserve(length)
        for buffer, found in zip(self._buffers, other._buffers, strict=True):
            buffer[len(self.sequences) - 1, :, :length] = found[row, :, :length]
        self.lengths[-1] = length

    def drop(self, sequence: int) -> None:
        """Forget a sequence; the last one takes its row."""
        row, last = self.sequences.index(sequence), len(self.sequences) - 1
        if row != last:
            self.swap(row, last)
        self.sequences.pop()
        self.lengths.pop()
        self.version += 1

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        length = max(self.lengths[one], self.lengths[other])
        for buffer in self._buffers:
            kept = buffer[one, :, :length].copy()
            buffer[one, :, :length] = buffer[other, :, :length]
            buffer[other, :, :length] = kept
        for values in (self.sequences, self.lengths):
            values[one], values[other] = values[other], values[one]

    def reserve(self, length: int) -> None:
        """Make room for so many positions in every row."""
        rows, _, capacity, _ = self._shape
        if length > capacity:
            self._resize(rows, max(length, capacity + capacity // 4))

    def _resize(self, rows: int, capacity: int) -> None:
        before = self._shape
        self._shape = (rows, before[1], capacity, before[3])
        if self._shape == before:
            return
        longest = max(self.lengths, default=0)
        for index, buffer in enumerate(self._buffers):
            grown = np.zeros(self._shape, np.float32)
            grown[: before[0], :, :longest] = buffer[:, :, :longest]
            self._buffers[index] = grown
        self.version += 1


class BatchCaches:
    """The caches of a stage: each sequence is in one of them, with those it was last computed
    with.
    """

    def __init__(self, blocks: int, kv_heads: int, width: int) -> None:
        self._sizes = (blocks, kv_heads, width)
        self._of: dict[int, BatchCache] = {}

    def together(self, sequences: list[int]) -> BatchCache:
        """A cache whose rows are just these, in this order; new ones have no positions.

        Nothing is moved where they were computed together before.
        """
        first = self._of.get(sequences[0])
        cache = BatchCache(*self._sizes) if first is None else first
        if cache.sequences == sequences:
            return cache
        for other in [s for s in cache.sequences if s not in sequences]:
            self._of[other] = alone = BatchCache(*self._sizes)
            alone.take(cache, other)
        for sequence in sequences:
            there = self._of.get(sequence)
            if there is None:
                cache.add(sequence)
            elif there is not cache:
                cache.take(there, sequence)
            self._of[sequence] = cache
        for row, sequence in enumerate(sequences):
            if cache.sequences[row] != sequence:
                cache.swap(row, cache.sequences.index(sequence))
        return cache

    def begin(self, sequence: int, source: int, length: int, *, kept: bool) -> None:
        """Let a new sequence have the first `length` positions of a `source`, which ends unless it
        is `kept`.
        """
        if sequence in self._of or source not in self._of or length > self.length(source):
            raise ProtocolError("a sequence cannot begin with what is not there")
        cache = self._of[source]
        if kept:
            self._of[sequence] = alone = BatchCache(*self._sizes)
            alone.copy(cache, source, sequence, length)
        else:
            del self._of[source]
            self._of[sequence] = cache
            cache.sequences[cache.sequences.index(source)] = sequence
            self.truncate(sequence, length)

    def length(self, sequence: int) -> int:
        """Positions of a sequence; 0 of an unknown one."""
        cache = self._of.get(sequence)
        return 0 if cache is None else cache.length(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence has after its first `length` positions."""
        cache = self._of.get(sequence)
        if cache is not None:
            row = cache.sequences.index(sequence)
            cache.lengths[row] = min(cache.lengths[row], length)

    def release(self, sequence: int) -> None:
        """Forget a sequence."""
        cache = self._of.pop(sequence, None)
        if cache is not None:
            cache.drop(sequence)

    @property
    def bytes(self) -> int:
        """Memory of all of them."""
        return sum(cache.bytes for cache in {id(c): c for c in self._of.values()}.values())
