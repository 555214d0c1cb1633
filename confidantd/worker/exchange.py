"""What a runner does between decisions: compute on a thread, send and receive arrays."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from confidantd.wire.frames import Frame, FrameKind
from confidantd.wire.passes import Pass
from confidantd.worker.links import Links
from confidantd.worker.turns import Turns

_T = TypeVar("_T")
LITTLE_SECONDS = 0.02


class Exchange:
    """One compute thread and the links of a stage; counts the seconds the thread was busy.

    `last`: when its last work began and ended (`time.perf_counter`), without the wait for a
    turn where another stage of the job is on this device.
    """

    def __init__(self, links: Links, turns_file: str = "") -> None:
        self.links = links
        self.busy_seconds = 0.0
        self.last = (0.0, 0.0)
        self._turns = Turns(turns_file)
        self._seconds: dict[int, float] = {}  # what work of each size took last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    async def compute(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """Run `work(*arguments, **named)` on the compute thread."""
        call = functools.partial(work, *arguments, **named)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._in_turn, call)

    async def compute_little(self, size: int, work: Callable[..., _T], *arguments: Any) -> _T:
        """As `compute`, but at once where work of that size took little time before: a thread's
        hand-over takes a part of it, and the event loop can wait as long.
        """
        if self._turns.shared or self._seconds.get(size, math.inf) > LITTLE_SECONDS:
            found = await self.compute(work, *arguments)
        else:
            found = self._in_turn(functools.partial(work, *arguments))
        self._seconds[size] = self.last[1] - self.last[0]
        return found

    def _in_turn(self, call: Callable[[], _T]) -> _T:
        with self._turns.turn():
            started = time.perf_counter()
            try:
                return call()
            finally:
                self.last = started, time.perf_counter()
                self.busy_seconds += self.last[1] - started

    async def send(
        self,
        stage: int,
        kind: FrameKind,
        step: int,
        microbatch: int,
        array: NDArray[Any],
        *,
        of: Pass | None = None,
    ) -> None:
        """Queue an array for another stage."""
        data = np.ascontiguousarray(array)
        await self.links.send(
            stage,
            kind,
            step,
            microbatch,
            data.reshape(-1).view(np.uint8).data,
            dtype=str(data.dtype),
            of=of,
            shape=array.shape,  # a scalar's: contiguous data has one dimension at least
        )

    async def receive(self, kind: FrameKind, step: int, microbatch: int) -> NDArray[Any]:
        """The array of that kind, step and microbatch, once it is there (read-only)."""
        frame, payload = await self.links.inbox.take(kind, step, microbatch)
        await self.links.used(frame)
        return as_array(frame, payload)

    async def next(self, kind: FrameKind) -> tuple[Frame, NDArray[Any]]:
        """The next frame of a streaming kind and its array."""
        frame, payload = await self.links.inbox.next(kind)
        await self.links.used(frame)
        return frame, as_array(frame, payload)

    def close(self) -> None:
        """End the compute thread after what it is doing now."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._turns.close()


def as_array(frame: Frame, payload: memoryview) -> NDArray[Any]:
    """The tensor of a frame, without a copy."""
    return np.frombuffer(payload, dtype=frame.dtype).reshape(frame.shape)
