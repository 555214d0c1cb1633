"""Fetching blobs by ranges: resumed, verified, shared, and clear about what fails."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from confidantd.errors import CorruptFileError, PeerLostError, ProtocolError, StorageError
from confidantd.ids import Digest, digest_of
from confidantd.store.blobs import BlobStore
from confidantd.store.fetch import RANGE_BYTES, RANGES_ASKED, fetch
from tests.full_disk import limited_files

DATA = os.urandom(2 * RANGE_BYTES + 12_345)
DIGEST = digest_of(DATA)


class Peer:
    """Serves one blob; remembers what was asked, and can leave or wait."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.leaves_before: int | None = None  # the offset whose range it no longer sends
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = asyncio.Event()  # as many ranges are asked for as may be
        self.at_once = self.most_at_once = 0

    async def read(self, _digest: Digest, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once == RANGES_ASKED:
            self.busy.set()
        try:
            await self.gate.wait()
            if self.leaves_before is not None and offset >= self.leaves_before:
                raise PeerLostError("the peer left")
            return self.data[offset : offset + length]
        finally:
            self.at_once -= 1


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def read_bytes(path: Path) -> bytes:
    return path.read_bytes()


async def test_a_blob_arrives_range_by_range(store: BlobStore) -> None:
    peer, seen = Peer(), []
    path = await fetch(store, peer.read, DIGEST, len(DATA), seen.append)
    assert read_bytes(path) == DATA
    assert path == store.path(DIGEST)
    assert sum(length for _, length in peer.asked) == len(DATA)
    assert max(length for _, length in peer.asked) == RANGE_BYTES
    assert seen == [RANGE_BYTES, 2 * RANGE_BYTES, len(DATA)]
    assert not store.part_path(DIGEST).exists()


async def test_ranges_are_asked_ahead_but_not_without_bound(store: BlobStore) -> None:
    data = bytes(6 * RANGE_BYTES)
    peer = Peer(data)
    peer.gate.clear()
    fetching = asyncio.ensure_future(fetch(store, peer.read, digest_of(data), len(data)))
    await peer.busy.wait()
    peer.gate.set()
    await fetching
    assert peer.most_at_once == RANGES_ASKED


async def test_what_is_there_is_not_fetched(store: BlobStore) -> None:
    peer = Peer()
    digest = await asyncio.to_thread(store.put_bytes, b"here")
    assert await fetch(store, peer.read, digest, 4) == store.path(digest)
    assert peer.asked == []


async def test_an_empty_blob(store: BlobStore) -> None:
    peer = Peer()
    path = await fetch(store, peer.read, digest_of(b""), 0)
    assert read_bytes(path) == b""


async def test_a_lost_peer_leaves_a_part_that_another_one_completes(store: BlobStore) -> None:
    peer = Peer()
    peer.leaves_before = RANGE_BYTES
    with pytest.raises(PeerLostError):
        await fetch(store, peer.read, DIGEST, len(DATA))
    assert await asyncio.to_thread(store.locate, DIGEST) is None
    assert store.part_path(DIGEST).stat().st_size == RANGE_BYTES
    other = Peer()
    path = await fetch(store, other.read, DIGEST, len(DATA))
    assert other.asked[0] == (RANGE_BYTES, RANGE_BYTES)
    assert read_bytes(path) == DATA


async def test_a_cancelled_fetch_is_gone_on_with(store: BlobStore) -> None:
    peer, first = Peer(), asyncio.Event()
    task = asyncio.ensure_future(
        fetch(store, peer.read, DIGEST, len(DATA), lambda _: (first.set(), peer.gate.clear()))
    )
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert peer.at_once == 0
    other = Peer()
    path = await fetch(store, other.read, DIGEST, len(DATA))
    assert other.asked[0][0] >= RANGE_BYTES
    assert read_bytes(path) == DATA


async def test_wrong_bytes_never_get_the_name(store: BlobStore) -> None:
    liar = Peer(bytes(len(DATA)))
    with pytest.raises(CorruptFileError, match="not what was promised"):
        await fetch(store, liar.read, DIGEST, len(DATA))
    assert list((store.root / "blobs").iterdir()) == []
    assert len(liar.asked) == 3  # a liar is asked once, not twice


async def test_a_damaged_part_is_fetched_again_from_the_start(store: BlobStore) -> None:
    store.part_path(DIGEST).write_bytes(bytes(RANGE_BYTES))
    peer = Peer()
    path = await fetch(store, peer.read, DIGEST, len(DATA))
    assert read_bytes(path) == DATA


async def test_a_part_that_is_too_long_is_dropped(store: BlobStore) -> None:
    store.part_path(DIGEST).write_bytes(DATA + b"x")
    peer = Peer()
    assert read_bytes(await fetch(store, peer.read, DIGEST, len(DATA))) == DATA
    assert peer.asked[0] == (0, RANGE_BYTES)


async def test_a_short_answer_is_a_broken_protocol(store: BlobStore) -> None:
    peer = Peer(DATA[:-1])
    with pytest.raises(ProtocolError, match="instead of"):
        await fetch(store, peer.read, DIGEST, len(DATA))


async def test_two_who_want_one_blob_share_its_fetch(store: BlobStore) -> None:
    peer = Peer()
    paths = await asyncio.gather(*(fetch(store, peer.read, DIGEST, len(DATA)) for _ in range(3)))
    assert len(set(paths)) == 1
    assert len(peer.asked) == 3


async def test_the_next_in_line_fetches_when_the_first_one_fails(store: BlobStore) -> None:
    gone, there = Peer(), Peer()
    gone.leaves_before = RANGE_BYTES
    found = await asyncio.gather(
        fetch(store, gone.read, DIGEST, len(DATA)),
        fetch(store, there.read, DIGEST, len(DATA)),
        fetch(store, there.read, DIGEST, len(DATA)),
        return_exceptions=True,
    )
    assert isinstance(found[0], PeerLostError)
    assert found[1] == found[2] == store.path(DIGEST)
    assert there.asked[0][0] == RANGE_BYTES
    assert read_bytes(store.path(DIGEST)) == DATA


async def test_a_full_disk_can_be_gone_on_from_once_there_is_space(store: BlobStore) -> None:
    with limited_files(RANGE_BYTES + 1000), pytest.raises(StorageError, match="disk is full"):
        await fetch(store, Peer().read, DIGEST, len(DATA))
    assert store.part_path(DIGEST).stat().st_size == RANGE_BYTES + 1000
    peer = Peer()
    assert read_bytes(await fetch(store, peer.read, DIGEST, len(DATA))) == DATA
    assert peer.asked[0][0] == RANGE_BYTES + 1000


async def test_the_reason_of_a_failed_write_is_told(store: BlobStore) -> None:
    store.part_path(DIGEST).mkdir()
    with pytest.raises(StorageError, match=os.strerror(errno.EISDIR)):
        await fetch(store, Peer().read, DIGEST, len(DATA))
