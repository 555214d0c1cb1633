"""Sequences change caches and rows, and what they hold stays theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from confidantd.engine.generation.batch_cache import BatchCaches
from confidantd.errors import ProtocolError

BLOCKS, HEADS, WIDTH = 2, 2, 3


class Caches(RuleBasedStateMachine):
    """Against one array a sequence and buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.caches = BatchCaches(BLOCKS, HEADS, WIDTH)
        self.held: dict[int, list[NDArray[np.float32]]] = {}
        self.numbers = np.random.default_rng(0)

    def run(self, sequences: list[int], steps: int) -> None:
        """What a run of a program does: new positions of every row of the cache."""
        cache = self.caches.together(sequences)
        assert cache.sequences == sequences
        cache.reserve(max(cache.lengths) + steps)
        flat = [buffer for both in cache.buffers() for buffer in both]
        for row, sequence in enumerate(sequences):
            start = cache.lengths[row]
            empty = np.zeros((HEADS, 0, WIDTH), np.float32)
            before = self.held.get(sequence, [empty] * len(flat))
            self.held[sequence] = []
            for buffer, old in zip(flat, before, strict=True):
                new = self.numbers.standard_normal((HEADS, steps, WIDTH)).astype(np.float32)
                buffer[row, :, start : start + steps] = new
                self.held[sequence].append(np.concatenate([old, new], 1))
            cache.lengths[row] = start + steps

    @rule(sequence=st.integers(0, 5), steps=st.integers(1, 90))
    def prompt(self, sequence: int, steps: int) -> None:
        """Alone."""
        self.run([sequence], steps)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Some of them together, in any order."""
        known = sorted(self.held)
        self.run(data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True)), 1)

    @rule(sequence=st.integers(0, 5), length=st.integers(0, 90))
    def truncate(self, sequence: int, length: int) -> None:
        """One that may not be there."""
        self.caches.truncate(sequence, length)
        if sequence in self.held:
            self.held[sequence] = [array[:, :length] for array in self.held[sequence]]

    @rule(sequence=st.integers(0, 5))
    def begin_with_nothing(self, sequence: int) -> None:
        """With what nobody has."""
        with pytest.raises(ProtocolError):
            self.caches.begin(sequence, 77, 0, kept=False)

    @precondition(lambda self: self.held)
    @rule(sequence=st.integers(0, 5), kept=st.booleans(), data=st.data())
    def begin(self, sequence: int, kept: bool, data: st.DataObject) -> None:
        """With what another one has."""
        source = data.draw(st.sampled_from(sorted(self.held)))
        there = self.held[source][0].shape[1]
        length = data.draw(st.integers(0, there + 1))
        if sequence in self.held or length > there:
            with pytest.raises(ProtocolError):
                self.caches.begin(sequence, source, length, kept=kept)
            return
        self.caches.begin(sequence, source, length, kept=kept)
        arrays = self.held[source] if kept else self.held.pop(source)
        self.held[sequence] = [array[:, :length] for array in arrays]

    @rule(sequence=st.integers(0, 5))
    def release(self, sequence: int) -> None:
        """One that may not be there."""
        self.caches.release(sequence)
        self.held.pop(sequence, None)

    @invariant()
    def all_is_there(self) -> None:
        """Every position of every sequence, and nothing of those that are gone."""
        for sequence, arrays in self.held.items():
            cache = self.caches.together([sequence]) if len(self.held) == 1 else None
            length = self.caches.length(sequence)
            assert length == arrays[0].shape[1]
            if cache is not None:
                flat = [buffer for both in cache.buffers() for buffer in both]
                for buffer, array in zip(flat, arrays, strict=True):
                    assert np.array_equal(buffer[0, :, :length], array)
        if not self.held:
            assert self.caches.bytes == 0

    @precondition(lambda self: self.held)
    @rule()
    def look(self) -> None:
        """All at once."""
        sequences = sorted(self.held)
        cache = self.caches.together(sequences)
        flat = [buffer for both in cache.buffers() for buffer in both]
        for row, sequence in enumerate(sequences):
            for buffer, array in zip(flat, self.held[sequence], strict=True):
                assert np.array_equal(buffer[row, :, : array.shape[1]], array)


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
