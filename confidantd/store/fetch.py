"""Fetching a blob from a peer by ranges: resumable, and verified before anybody uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from confidantd.errors import CorruptFileError, ProtocolError
from confidantd.ids import Digest
from confidantd.store.blobs import BlobStore
from confidantd.store.files import storage_error

RANGE_BYTES = 4 * 1024 * 1024  # what a 50 Mbit/s link carries in 0.7 s: progress moves
ATTEMPTS = 2  # a kept part that was damaged is found out at the end; then from the start
ReadRange = Callable[[Digest, int, int], Awaitable[bytes]]

_running: dict[tuple[Path, Digest], asyncio.Lock] = {}


async def fetch(
    store: BlobStore,
    read_range: ReadRange,
    digest: Digest,
    size_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """The file of a blob, fetched if it is not here yet; `progress` gets the bytes so far.

    What an interrupted fetch left is kept and gone on with. `CorruptFileError` when
    the peer's bytes do not have the digest.
    """
    key = (store.root, digest)
    lock = _running.setdefault(key, asyncio.Lock())
    try:
        async with lock:
            for attempt in range(ATTEMPTS):
                if store.path(digest).exists():
                    break
                resumed = await _fill(store, read_range, digest, size_bytes, progress)
                try:
                    await asyncio.to_thread(store.finish, digest)
                except CorruptFileError:
                    if not resumed or attempt + 1 == ATTEMPTS:
                        raise
    finally:
        if not lock.locked():
            _running.pop(key, None)
    return store.path(digest)


async def _fill(
    store: BlobStore,
    read_range: ReadRange,
    digest: Digest,
    size_bytes: int,
    progress: Callable[[int], None],
) -> bool:
    """Bring the `.part` file to its full size; True if it had some bytes already."""
    part = store.part_path(digest)
    have = await asyncio.to_thread(_size, part, size_bytes)
    resumed = have > 0
    while have < size_bytes:
        length = min(RANGE_BYTES, size_bytes - have)
        data = await read_range(digest, have, length)
        if len(data) != length:
            raise ProtocolError(f"a peer sent {len(data)} bytes of a blob instead of {length}")
        await asyncio.to_thread(_append, part, have, data)
        have += length
        progress(have)
    if size_bytes == 0:
        await asyncio.to_thread(_append, part, 0, b"")
    return resumed


def _size(part: Path, size_bytes: int) -> int:
    try:
        size = part.stat().st_size
    except FileNotFoundError:
        return 0
    if size > size_bytes:
        part.unlink()
        return 0
    return size


def _append(part: Path, offset: int, data: bytes) -> None:
    try:
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)
    except OSError as failure:
        raise storage_error(part, failure) from None
