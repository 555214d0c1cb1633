"""Frames that arrived and wait for the runner, sorted by kind, step and microbatch."""

from __future__ import annotations

import asyncio

from confidantd.errors import ConfidantError, ProtocolError
from confidantd.ids import JobId
from confidantd.wire.frames import Frame, FrameKind

Key = tuple[FrameKind, int, int]
Item = tuple[Frame, memoryview]
_NOBODY = JobId("")  # in the frame that wakes a stream after a failure


class Inbox:
    """Bounded store of received frames.

    1F1B itself bounds what can be in flight; `max_bytes` is far above that, so a
    peer that exceeds it is faulty: `put` then raises `ProtocolError`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._items: dict[Key, Item] = {}
        self._waiting: dict[Key, asyncio.Future[Item]] = {}
        self._streams: dict[FrameKind, asyncio.Queue[Item]] = {}
        self._failure: ConfidantError | None = None

    def put(self, frame: Frame, payload: memoryview) -> None:
        """Keep a frame, or give it to whoever waits for it."""
        if self._held_bytes + len(payload) > self._max_bytes:
            raise ProtocolError(f"stage {frame.stage} sends faster than the schedule allows")
        if frame.kind in (FrameKind.HIDDEN, FrameKind.TOKEN):
            self._held_bytes += len(payload)
            self._stream(frame.kind).put_nowait((frame, payload))
            return
        key = (frame.kind, frame.step, frame.microbatch)
        waiter = self._waiting.pop(key, None)
        if waiter is not None and not waiter.done():
            waiter.set_result((frame, payload))
        elif key in self._items:
            raise ProtocolError(f"stage {frame.stage} sent the same {frame.kind.value} twice")
        else:
            self._held_bytes += len(payload)
            self._items[key] = (frame, payload)

    async def take(self, kind: FrameKind, step: int, microbatch: int) -> Item:
        """The frame of that kind, step and microbatch, once it is there."""
        key = (kind, step, microbatch)
        item = self._items.pop(key, None)
        if item is not None:
            self._held_bytes -= len(item[1])
            return item
        self._raise_failure()
        waiter: asyncio.Future[Item] = asyncio.get_running_loop().create_future()
        self._waiting[key] = waiter
        try:
            return await waiter
        finally:
            self._waiting.pop(key, None)

    async def next(self, kind: FrameKind) -> Item:
        """The next frame of a streaming kind (generation), in order of arrival."""
        self._raise_failure()
        item = await self._stream(kind).get()
        self._raise_failure()
        self._held_bytes -= len(item[1])
        return item

    def fail(self, failure: ConfidantError) -> None:
        """End every wait, now and later, with `failure`; the first one wins."""
        self._failure = self._failure or failure
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(self._failure)
        for kind, queue in self._streams.items():
            queue.put_nowait((Frame(_NOBODY, 0, kind, -1, 0, 0, shape=(0,)), memoryview(b"")))

    def _stream(self, kind: FrameKind) -> asyncio.Queue[Item]:
        return self._streams.setdefault(kind, asyncio.Queue())

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
