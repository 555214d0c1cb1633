"""What a runner does between decisions: compute on a thread, send and receive arrays."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from confidantd.wire.frames import Frame, FrameKind
from confidantd.worker.links import Links

_T = TypeVar("_T")


class Exchange:
    """One compute thread and the links of a stage; counts the seconds the thread was busy."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.busy_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    async def compute(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """Run `work(*arguments, **named)` on the compute thread."""
        started = time.perf_counter()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._thread, functools.partial(work, *arguments, **named)
            )
        finally:
            self.busy_seconds += time.perf_counter() - started

    async def send(
        self, stage: int, kind: FrameKind, step: int, microbatch: int, array: NDArray[Any]
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


def as_array(frame: Frame, payload: memoryview) -> NDArray[Any]:
    """The tensor of a frame, without a copy."""
    return np.frombuffer(payload, dtype=frame.dtype).reshape(frame.shape)
