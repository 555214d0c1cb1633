"""Brings the blobs of a stage (programs, tensors) to this device, and tells the owner how far."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from confidantd.errors import CorruptFileError, ModelError, PeerLostError, ProtocolError
from confidantd.ids import DeviceId, Digest
from confidantd.jobs.peers import Peers
from confidantd.store.blobs import BlobStore
from confidantd.store.fetch import fetch
from confidantd.tasks import plain_errors
from confidantd.wire.codec import to_map
from confidantd.wire.jobs import StageProgress
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import BlobRange

_log = logging.getLogger(__name__)

PARALLEL_FETCHES = 4


class StageBlobs:
    """Fetches what is not in the store yet, or damaged there, some blobs at a time."""

    def __init__(self, peers: Peers, store: BlobStore) -> None:
        self._peers = peers
        self._store = store

    async def fetch(self, owner: DeviceId, assignment: StageAssignment) -> dict[Digest, BlobRange]:
        """Where each blob of an assignment lies on this device, once all are here."""
        sizes = {entry.digest: entry.bytes for entry in assignment.programs.values()}
        sizes |= {t.digest: t.bytes for t in assignment.tensors + assignment.adapter_tensors}
        sizes |= {entry.digest: entry.bytes for entry in assignment.state}
        holders = {entry.digest: entry.source for entry in assignment.state}
        progress = _FetchProgress(self._peers, owner, assignment, sum(sizes.values()))
        gate = asyncio.Semaphore(PARALLEL_FETCHES)

        async def one(digest: Digest, size_bytes: int) -> tuple[Digest, BlobRange]:
            async with gate:
                source = holders.get(digest, assignment.source)
                found = await self._checked(digest, own=source == self._peers.self_id)
                if found is None:
                    await fetch(
                        self._store,
                        lambda d, offset, length: self._peers.read_blob(source, d, offset, length),
                        digest,
                        size_bytes,
                        passing=digest in holders,
                    )
                    found = await asyncio.to_thread(self._store.locate, digest)
            if found is None or found[2] != size_bytes:
                raise ProtocolError(f"blob {digest[:12]} has another size than announced")
            await progress.add(size_bytes)
            return digest, BlobRange(str(found[0]), found[1], found[2])

        async def every() -> dict[Digest, BlobRange]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(d, size)) for d, size in sizes.items()]
            return dict(task.result() for task in tasks)

        return await plain_errors(every())

    async def _checked(self, digest: Digest, *, own: bool) -> tuple[Path, int, int] | None:
        """A blob that is here and whole. One of this device's `own` is nowhere else."""
        try:
            found = await asyncio.to_thread(self._store.check, digest)
        except CorruptFileError as failure:
            if own:
                raise ModelError(failure.message, failure.hint) from None
            _log.warning("%s; it is fetched from another device", failure.message)
            return None
        if found is None and own:
            raise ModelError(f"the blob {digest[:12]} was damaged on this disk", "try again")
        return found


class _FetchProgress:
    """Tells the owner how many bytes of a stage have arrived, at every tenth."""

    def __init__(self, peers: Peers, owner: DeviceId, assignment: StageAssignment, of: int) -> None:
        self._peers = peers
        self._owner = owner
        self._assignment = assignment
        self._of = of
        self._done = 0
        self._told = -1

    async def add(self, size_bytes: int) -> None:
        """Count a blob that is here."""
        self._done += size_bytes
        tenth = 10 * self._done // max(self._of, 1)
        if tenth == self._told:
            return
        self._told = tenth
        place = self._assignment
        message = StageProgress(
            place.job, place.epoch, place.stage, "distribute", self._done, self._of
        )
        with contextlib.suppress(PeerLostError):
            await self._peers.notify(self._owner, "stage.progress", to_map(message))
