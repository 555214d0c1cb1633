"""Flow control of one link: a sender may be so many frames ahead of what the receiver has used."""

from __future__ import annotations

import asyncio
from collections import deque

from confidantd.errors import ConfidantError
from confidantd.wire.frames import FrameKind

# Kinds that a fast stage could pile up at a slow one. Others come once a step, or, in
# generation, no faster than the head answers.
CONTROLLED = frozenset({FrameKind.ACTIVATION, FrameKind.GRADIENT})
LEAST_WINDOW = 16
RETURNED_AT_ONCE = 4  # one credit frame for so many used frames: each costs as much as a small one


def window(stages: int) -> int:
    """Frames that may be under way or waiting on one link.

    1F1B has at most `stages` unused activations and as many gradients between two
    neighbours, so training never waits here, which could deadlock; only evaluation,
    which goes one way, is held back. Beside them stand used frames whose credits
    are not returned yet.
    """
    return max(LEAST_WINDOW, 2 * stages + RETURNED_AT_ONCE)


class Credits:
    """Credits of one sender for one link; and those that it owes the other side."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._failure: ConfidantError | None = None

    async def acquire(self) -> None:
        """Take a credit, as soon as there is one; raises why there never will be."""
        if self._failure is not None:
            raise self._failure
        if self._count > 0:
            self._count -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def release(self) -> None:
        """The receiver has used some frames."""
        for _ in range(RETURNED_AT_ONCE):
            self._release_one()

    def use(self) -> bool:
        """A frame of the other side was used; whether it is time to return credits."""
        self._used = (self._used + 1) % RETURNED_AT_ONCE
        return self._used == 0

    def _release_one(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._count += 1

    def fail(self, failure: ConfidantError) -> None:
        """The link is gone: end every wait."""
        self._failure = failure
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(failure)
        self._waiting.clear()
