"""Copies of what neighbours hold, fetched beside a job's work: with them a device can take over a
stage whose own device is lost, without waiting for the network.

Only weights that nobody trains are worth it. They lie in the store like any other blob.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId, Digest, JobId
from confidantd.jobs.moving import Wanted, parts_of_plan
from confidantd.jobs.peers import Peers
from confidantd.models.spec import ModelSpec
from confidantd.planner.plan import StagePlan
from confidantd.store.blobs import BlobStore
from confidantd.store.fetch import fetch
from confidantd.tasks import TaskSet
from confidantd.wire.jobs import Spares
from confidantd.wire.stage import TensorEntry

_log = logging.getLogger(__name__)

NEIGHBOURS = 2  # behind a stage, whose weights it keeps: any two devices may be lost
SHARE = 0.25  # of the time that a link is used for it
MOST_WAITING = 32  # of one job; a plan has as many neighbours as there are devices
FREE_BYTES = 1_000_000_000  # of the disk that stay free


def wanted_spares(model: ModelSpec, stages: Sequence[StagePlan]) -> dict[int, dict[int, list[str]]]:
    """For each stage the checkpoint names of the tensors of its neighbours, by their stage."""
    found: dict[int, dict[int, list[str]]] = {}
    for index, stage in enumerate(stages):
        behind = range(index + 1, min(index + 1 + NEIGHBOURS, len(stages)))
        found[index] = {
            other: list(Wanted(parts_of_plan(stages[other])).tensor_names(model))
            for other in behind
            if stages[other].device != stage.device
        }
    return found


class SpareKeeper:
    """Fetches the spares of the jobs that this device holds stages of."""

    def __init__(self, peers: Peers, store: BlobStore) -> None:
        self._peers = peers
        self._store = store
        self._tasks = TaskSet("spares")
        self._of: dict[JobId, list[asyncio.Task[None]]] = {}

    def keep(self, spares: Spares) -> None:
        """Fetch them, after those that were asked for before."""
        before = self._of.setdefault(spares.job, [])
        before[:] = [task for task in before if not task.done()]
        if len(before) >= MOST_WAITING:
            return
        waits = before[-1] if before else None
        before.append(self._tasks.start(self._fetch_all(spares, waits), f"job-{spares.job}"))

    def drop(self, job: JobId) -> None:
        """Fetch no more for a job; what is here stays."""
        for task in self._of.pop(job, []):
            task.cancel()

    async def close(self) -> None:
        """Fetch no more."""
        await self._tasks.close()

    async def _fetch_all(self, spares: Spares, waits: asyncio.Task[None] | None) -> None:
        if waits is not None:
            await asyncio.wait([waits])
        left = sum(tensor.bytes for tensor in spares.tensors)
        free = await asyncio.to_thread(lambda: shutil.disk_usage(self._store.root).free)
        if free < left + FREE_BYTES:
            _log.info("job %s: no room on the disk for spare weights", spares.job)
            return
        for tensor in spares.tensors:
            try:
                await self._fetch(tensor, spares.source)
            except ConfidantError as failure:
                _log.info("job %s: a spare weight is not here: %s", spares.job, failure)

    async def _fetch(self, tensor: TensorEntry, source: DeviceId) -> None:
        """Unless it is here."""

        async def slowly(digest: Digest, offset: int, length: int) -> bytes:
            began = time.monotonic()
            data = await self._peers.read_blob(source, digest, offset, length)
            await asyncio.sleep((time.monotonic() - began) * (1 / SHARE - 1))
            return data

        if await asyncio.to_thread(self._store.locate, tensor.digest) is None:
            await fetch(self._store, slowly, tensor.digest, tensor.bytes)
