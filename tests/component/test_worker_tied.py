"""Both ends of a tied table end up with the same sum, a few pieces at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from confidantd.wire.frames import FrameKind
from confidantd.worker.tied import TIED_AHEAD, join_tied_gradients, tied_rows

ROWS, WIDTH = 5_000, 300


class End:
    """A gradient."""

    def __init__(self, seed: int) -> None:
        self.gradient = np.random.default_rng(seed).standard_normal((ROWS, WIDTH), np.float32)

    def tied_gradient(self) -> Any:
        """Where it lies."""
        return self.gradient

    def add_tied_gradient(self, other: Any, first_row: int = 0) -> None:
        """In place."""
        self.gradient[first_row : first_row + len(other)] += other


class Side:
    """One side of a link that carries copies, and counts how many are on their way."""

    def __init__(self) -> None:
        self.arrived: dict[tuple[FrameKind, int, int], Any] = {}
        self.most = 0
        self.other: Side
        self.news = asyncio.Event()

    async def send(
        self, stage: int, kind: FrameKind, step: int, microbatch: int, array: Any
    ) -> None:
        """A copy arrives at once."""
        assert stage in (0, 1)
        self.other.arrived[kind, step, microbatch] = array.copy()
        self.other.most = max(self.other.most, len(self.other.arrived))
        self.other.news.set()

    async def receive(self, kind: FrameKind, step: int, microbatch: int) -> Any:
        """As soon as it is there."""
        while (kind, step, microbatch) not in self.arrived:
            self.news.clear()
            await self.news.wait()
        return self.arrived.pop((kind, step, microbatch))

    async def compute(self, work: Any, *arguments: Any) -> Any:
        """Here and now; others run before it."""
        await asyncio.sleep(0)
        return work(*arguments)


async def test_both_ends_hold_the_same_sum() -> None:
    ends, sides = [End(1), End(2)], [Side(), Side()]
    sides[0].other, sides[1].other = sides[1], sides[0]
    wanted = ends[0].gradient + ends[1].gradient
    await asyncio.gather(*(join_tied_gradients(ends[i], sides[i], 1 - i, step=3) for i in range(2)))
    assert -(-ROWS // tied_rows(WIDTH)) > TIED_AHEAD  # else nothing would be held back
    for end, side in zip(ends, sides, strict=True):
        assert np.array_equal(end.gradient, wanted)
        assert not side.arrived
        assert 1 < side.most <= 2 * TIED_AHEAD
