"""What a stage says, on its way to the owner of its job."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from confidantd.errors import StorageError
from confidantd.jobs.grants import Held
from confidantd.jobs.peers import Peers
from confidantd.jobs.speed_book import SpeedBook
from confidantd.store.blobs import BlobStore
from confidantd.wire.codec import to_map
from confidantd.wire.jobs import StageEvent
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import (
    Collected,
    Event,
    Exported,
    Snapshotted,
    StateBlob,
    StepDone,
    TrainedTensor,
    message_map,
)

_Written = TypeVar("_Written", TrainedTensor, StateBlob)


class StageHearer:
    """Passes the events of a stage on to its owner, and learns from its steps."""

    def __init__(self, peers: Peers, store: BlobStore, speeds: SpeedBook, held: Held) -> None:
        self._peers, self._store, self._speeds, self._held = peers, store, speeds, held
        self._steps: tuple[int, int] = (0, 0)  # epoch, and steps done in it

    async def hear(self, place: StageAssignment, event: Event) -> None:
        """One event, in order."""
        told: Event = event
        if isinstance(event, StepDone):
            self._observe(place, event)
        if isinstance(event, Collected):
            stored = [await self._stored(tensor) for tensor in event.tensors]
            told = replace(event, tensors=tuple(stored))
            self._held.trained += [t.digest for t in stored if t.digest is not None]
        if isinstance(event, Exported | Snapshotted):
            told = await self._with_stored(event)
        message = StageEvent(place.job, place.epoch, place.stage, message_map(told))
        await self._peers.notify(self._held.offer.owner, "stage.event", to_map(message))

    def _observe(self, place: StageAssignment, step: StepDone) -> None:
        """The first step of an epoch also fills memory and says nothing."""
        epoch, steps = self._steps
        self._steps = (place.epoch, steps + 1 if epoch == place.epoch else 1)
        if self._steps[1] > 1:
            self._speeds.observe(place, step)

    async def _with_stored(self, event: Exported | Snapshotted) -> Event:
        """A snapshot that finds no room on the disk is none; the stage goes on."""
        kept = self._held.trained
        if isinstance(event, Snapshotted):
            kept = self._held.snapshots.setdefault(event.steps, [])
        blobs: list[StateBlob] = []
        try:
            for blob in event.blobs:
                blobs.append(await self._stored(blob))
                kept += [d for d in (blobs[-1].digest,) if d is not None]
        except StorageError as failure:
            rest = [Path(blob.path) for blob in event.blobs[len(blobs) :]]
            await asyncio.to_thread(_unlink, rest)
            if isinstance(event, Exported):
                raise
            return Snapshotted(event.steps, (), str(failure))
        return replace(event, blobs=tuple(blobs))

    async def _stored(self, found: _Written) -> _Written:
        """A file becomes a blob, for others to fetch until the stage is released."""
        digest = await asyncio.to_thread(self._store.put_file, Path(found.path), passing=True)
        return replace(found, path="", digest=digest)


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
