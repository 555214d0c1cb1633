"""Fetching a blob from a peer by ranges: resumable, and verified before anybody uses it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

from confidantd.errors import CorruptFileError, ProtocolError
from confidantd.ids import Digest
from confidantd.store.blobs import BlobStore
from confidantd.store.files import storage_error
from confidantd.tasks import TaskSet

RANGE_BYTES = 1024 * 1024  # a few in memory weigh little, and hide the round trip of a Wi-Fi
RANGES_ASKED = 3  # the next ones are on their way while one is written
ATTEMPTS = 2  # a kept part that was damaged is found out at the end; then from the start
ReadRange = Callable[[Digest, int, int], Awaitable[bytes]]


async def fetch(
    store: BlobStore,
    read_range: ReadRange,
    digest: Digest,
    size_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
    *,
    passing: bool = False,
) -> Path:
    """The file of a blob, fetched if it is not here yet; `progress` gets the bytes so far.

    What an interrupted fetch left is kept and gone on with. `CorruptFileError` when
    the peer's bytes do not have the digest. Callers that want one blob share its fetch.
    """
    path = store.path(digest, passing=passing)
    async with store.fetch_lock(digest):
        for attempt in range(ATTEMPTS):
            if await asyncio.to_thread(path.exists):
                break
            part = store.part_path(digest, passing=passing)
            resumed = await _fill(part, read_range, digest, size_bytes, progress)
            try:
                await _to_its_end(asyncio.to_thread(store.finish, digest, passing=passing))
            except CorruptFileError:
                if not resumed or attempt + 1 == ATTEMPTS:
                    raise
    return path


async def _fill(
    part: Path,
    read_range: ReadRange,
    digest: Digest,
    size_bytes: int,
    progress: Callable[[int], None],
) -> bool:
    """Bring the `.part` file to its full size; True if it had some bytes already."""
    have = await asyncio.to_thread(_size, part, size_bytes)
    resumed = have > 0
    async with aclosing(_ranges(read_range, digest, have, size_bytes)) as ranges:
        async for data in ranges:
            await _to_its_end(asyncio.to_thread(_append, part, have, data))
            have += len(data)
            progress(have)
    if size_bytes == 0:
        await asyncio.to_thread(_append, part, 0, b"")
    return resumed


async def _to_its_end(work: Coroutine[Any, Any, object]) -> None:
    """Also when cancelled: nothing may be written any more after that."""
    writing = asyncio.ensure_future(work)
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        writing.exception()  # nobody hears it any more
        raise


async def _ranges(
    read_range: ReadRange, digest: Digest, first: int, past_last: int
) -> AsyncGenerator[bytes, None]:
    """The bytes [first, past_last) range by range and in order, `RANGES_ASKED` at a time."""

    async def read(offset: int) -> bytes:
        length = min(RANGE_BYTES, past_last - offset)
        data = await read_range(digest, offset, length)
        if len(data) != length:
            raise ProtocolError(f"a peer sent {len(data)} bytes of a blob instead of {length}")
        return data

    tasks = TaskSet("fetch")
    asked: deque[asyncio.Task[bytes]] = deque()
    try:
        for offset in range(first, past_last, RANGE_BYTES):
            asked.append(tasks.start(read(offset), f"{digest[:12]}-{offset}"))
            if len(asked) == RANGES_ASKED:
                yield await asked.popleft()
        while asked:
            yield await asked.popleft()
    finally:
        await tasks.close()


def _size(part: Path, size_bytes: int) -> int:
    try:
        size = part.stat().st_size
        if size <= size_bytes:
            return size
        part.unlink()
    except FileNotFoundError:
        pass
    except OSError as failure:
        raise storage_error(part, failure) from None
    return 0


def _append(part: Path, offset: int, data: bytes) -> None:
    """Write `data` at `offset`; what was written when the disk is full can be gone on with."""
    try:
        with part.open("r+b" if offset else "wb", buffering=0) as file:
            file.seek(offset)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
    except OSError as failure:
        raise storage_error(part, failure) from None
