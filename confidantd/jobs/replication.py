"""Brings what a job has trained to its owner's disk while it trains, so that no device's loss
loses more than the steps since.

A snapshot is taken between two steps by all stages alike, and fetched beside the next steps.
When all of it lies on the owner's disk the step is committed: there the job goes on after a
loss. At most one snapshot is under way, and the next one begins so late that all of them take
no more than a share of the time: every step for adapters over most links.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from confidantd.errors import ConfidantError, PeerLostError
from confidantd.ids import DeviceId, Digest
from confidantd.jobs.checkpoints import Checkpoint, Checkpoints
from confidantd.jobs.job_plans import Launched
from confidantd.jobs.moving import handed_over, whole_stage
from confidantd.jobs.record import JobLog
from confidantd.jobs.services import JobServices
from confidantd.jobs.setup import Workload
from confidantd.models.spec import Method
from confidantd.store.fetch import fetch
from confidantd.tasks import TaskSet
from confidantd.wire.stage import StateEntry
from confidantd.wire.worker import Snapshot, Snapshotted, StateBlob

_log = logging.getLogger(__name__)

# Of the time, at most: adapters are small, whole models come in the background of many steps.
SHARES: dict[Method, float] = {"lora": 0.5, "full": 0.1}


class Pace:
    """When the next snapshot may begin, from how long the last one took; seconds of any clock."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._next = 0.0

    def due(self, now: float) -> bool:
        """Whether it may begin."""
        return now >= self._next

    def took(self, begin: float, end: float) -> None:
        """A snapshot was under way from `begin` to `end`."""
        self._next = begin + (end - begin) / self._share


@dataclass(slots=True)
class _Pending:
    """A snapshot that is under way; `began` when the first stage had written its part."""

    steps: int
    stages: int
    began: float = 0.0
    there: dict[int, dict[str, StateEntry]] = field(default_factory=dict)
    fetched_bytes: int = 0
    fetched: set[Digest] = field(default_factory=set)


class Replication:
    """That of one job; `committed` is where it goes on after a loss."""

    def __init__(
        self,
        services: JobServices,
        log: JobLog,
        workload: Workload,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        committed: Checkpoint | None,
    ) -> None:
        self._services, self._log, self._workload = services, log, workload
        self._checkpoints, self._facts = checkpoints, facts
        self.committed = committed
        self._pace = Pace(SHARES[workload.method or "full"])
        self._launched: Launched | None = None
        self._pending: _Pending | None = None
        self._problem = ""
        self._tasks = TaskSet("replication")
        self.last: dict[str, Any] | None = None  # what `step` events tell of it

    async def adopt(self, launched: Launched) -> None:
        """Take snapshots of another pipeline from now on."""
        await self.close()
        self._launched = launched

    async def close(self) -> None:
        """Drop what is under way."""
        await self._tasks.close()
        await self._drop()

    async def after(self, steps: int) -> None:
        """These steps were sent to the stages: a snapshot may follow them."""
        now = time.monotonic()
        if self._launched is None or self._pending is not None or not self._pace.due(now):
            return
        keep = () if self.committed is None else (self.committed.steps,)
        self._pending = _Pending(steps, len(self._launched.pipeline))
        await self._launched.pipeline.broadcast(Snapshot(steps, keep))

    def heard(self, stage: int, event: Snapshotted) -> None:
        """A stage has written its part."""
        pending = self._pending
        if pending is None or event.steps != pending.steps or self._launched is None:
            return
        pending.began = pending.began or time.monotonic()
        self._tasks.start(self._bring(self._launched, pending, stage, event), f"stage-{stage}")

    async def _bring(
        self, launched: Launched, pending: _Pending, stage: int, event: Snapshotted
    ) -> None:
        """Fetch one stage's part; with the last one write the checkpoint."""
        try:
            if event.problem:
                raise ConfidantError(f"{launched.plan.stages[stage].name}: {event.problem}")
            workload = self._workload
            sizes = whole_stage(
                workload.spec, workload.method, workload.lora, launched.plan.stages[stage]
            )
            device = launched.plan.stages[stage].device
            entries = handed_over(event.blobs, sizes, device)
            for blob in event.blobs:
                await self._fetch(device, pending, blob)
            pending.there[stage] = entries
            if len(pending.there) == pending.stages:
                await self._commit(pending)
        except ConfidantError as failure:
            self._failed(pending, failure)

    async def _fetch(self, device: DeviceId, pending: _Pending, blob: StateBlob) -> None:
        store, peers = self._services.store, self._services.peers
        assert blob.digest is not None
        if await asyncio.to_thread(store.locate, blob.digest) is None:
            pending.fetched.add(blob.digest)
            await fetch(
                store,
                lambda digest, offset, length: peers.read_blob(device, digest, offset, length),
                blob.digest,
                blob.bytes,
                passing=True,
            )
            pending.fetched_bytes += blob.bytes

    async def _commit(self, pending: _Pending) -> None:
        entries = {name: e for found in pending.there.values() for name, e in found.items()}
        before = 0 if self.committed is None else self.committed.steps
        facts = {**self._facts, "epoch": self._log.record.epoch}
        self.committed = await asyncio.to_thread(
            self._checkpoints.write, pending.steps, entries, facts
        )
        now = time.monotonic()
        self._pace.took(pending.began, now)
        seconds = now - pending.began
        self.last = {
            "step": pending.steps,
            "every_steps": pending.steps - before,
            "seconds": round(seconds, 3),
            "bytes": sum(self.committed.blobs.values()),
            "sent_bytes": pending.fetched_bytes,
            "mbps": round(8e-6 * pending.fetched_bytes / max(seconds, 1e-3), 1),
        }
        self._log.record.committed = pending.steps
        self._problem = ""
        await self._drop()

    def _failed(self, pending: _Pending, failure: ConfidantError) -> None:
        """The job goes on without this one. Lost devices are told of elsewhere."""
        if self._pending is not pending:
            return
        self._tasks.start(self._drop(), "drop")
        self._pace.took(pending.began, time.monotonic() + 1.0)
        if isinstance(failure, PeerLostError) or failure.message == self._problem:
            _log.info("no checkpoint after %d steps: %s", pending.steps, failure)
            return
        self._problem = failure.message
        text = f"no checkpoint after {pending.steps} steps, the job goes on: {failure.message}"
        place = {"device": self._services.self_id, "name": self._log.record.owner}
        self._log.emit({"event": "notice", "code": "no-checkpoint", "message": text, **place})

    async def _drop(self) -> None:
        """A checkpoint has files of its own: what was fetched for it may go from the store."""
        pending, self._pending = self._pending, None
        for digest in pending.fetched if pending else ():
            await asyncio.to_thread(self._services.store.remove, digest)
            part = self._services.store.part_path(digest, passing=True)
            await asyncio.to_thread(part.unlink, missing_ok=True)
