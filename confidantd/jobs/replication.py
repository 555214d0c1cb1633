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
from typing import Any

from confidantd.errors import ConfidantError, PeerLostError, StorageError
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
from confidantd.wire.messages import clean_text
from confidantd.wire.resources import MAX_REASON_CHARACTERS
from confidantd.wire.stage import StateEntry
from confidantd.wire.worker import Snapshot, Snapshotted, StateBlob

_log = logging.getLogger(__name__)

# Of the time, at most: adapters are small, whole models come in the background of many steps.
SHARES: dict[Method, float] = {"lora": 0.5, "full": 0.1}
MOST_NOTICES = 20  # of different problems between two checkpoints


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


class _Pending:
    """A snapshot that is under way; `began` when the first stage had written its part."""

    def __init__(self, steps: int, launched: Launched) -> None:
        self.steps, self.launched = steps, launched
        self.began = 0.0
        self.there: dict[int, dict[str, StateEntry]] = {}
        self.fetched: dict[Digest, int] = {}
        self.tasks = TaskSet(f"snapshot-{steps}")

    @property
    def complete(self) -> bool:
        """Whether every stage's part is here."""
        return len(self.there) == len(self.launched.pipeline)


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
        self._writing: asyncio.Future[Checkpoint] | None = None
        self._problems: set[str] = set()
        self._tasks = TaskSet("replication")
        self.last: dict[str, Any] | None = None  # what `step` events tell of it

    async def adopt(self, launched: Launched) -> None:
        """Take snapshots of another pipeline from now on."""
        await self.close()
        self._launched = launched

    async def close(self) -> None:
        """Drop what is under way; a checkpoint that is being written counts."""
        pending, self._pending = self._pending, None
        if pending is not None:
            await pending.tasks.close()
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._take_written()
        if pending is not None:
            await self._forget(pending)
        await self._tasks.finish()

    async def after(self, steps: int) -> None:
        """These steps were sent to the stages: a snapshot may follow them."""
        now = time.monotonic()
        if self._launched is None or self._pending is not None or not self._pace.due(now):
            return
        keep = () if self.committed is None else (self.committed.steps,)
        self._pending = _Pending(steps, self._launched)
        await self._launched.pipeline.broadcast(Snapshot(steps, keep))

    def heard(self, stage: int, event: Snapshotted) -> None:
        """A stage has written its part."""
        pending = self._pending
        if pending is None or event.steps != pending.steps or stage in pending.there:
            return
        pending.began = pending.began or time.monotonic()
        pending.tasks.start(self._bring(pending, stage, event), f"stage-{stage}")

    async def _bring(self, pending: _Pending, stage: int, event: Snapshotted) -> None:
        """Fetch one stage's part; with the last one write the checkpoint."""
        planned, workload = pending.launched.plan.stages[stage], self._workload
        try:
            if event.problem:
                raise StorageError(
                    f"{planned.name}: {clean_text(event.problem, MAX_REASON_CHARACTERS)}"
                )
            sizes = whole_stage(workload.spec, workload.method, workload.lora, planned)
            entries = handed_over(event.blobs, sizes, planned.device)
            for blob in event.blobs:
                await self._fetch(planned.device, pending, blob)
            pending.there[stage] = entries
            if pending.complete:
                await self._commit(pending)
        except ConfidantError as failure:
            self._failed(pending, failure)

    async def _fetch(self, device: DeviceId, pending: _Pending, blob: StateBlob) -> None:
        store, peers = self._services.store, self._services.peers
        assert blob.digest is not None
        if await asyncio.to_thread(store.locate, blob.digest) is None:
            pending.fetched[blob.digest] = blob.bytes
            await fetch(
                store,
                lambda digest, offset, length: peers.read_blob(device, digest, offset, length),
                blob.digest,
                blob.bytes,
                passing=True,
            )

    async def _commit(self, pending: _Pending) -> None:
        entries = {name: e for found in pending.there.values() for name, e in found.items()}
        before = 0 if self.committed is None else self.committed.steps
        facts = {**self._facts, "epoch": self._log.record.epoch}
        writing = asyncio.to_thread(self._checkpoints.write, pending.steps, entries, facts)
        self._writing = asyncio.ensure_future(writing)
        await asyncio.shield(self._writing)
        self._take_written()
        assert self.committed is not None
        now, sent = time.monotonic(), sum(pending.fetched.values())
        self._pace.took(pending.began, now)
        seconds = now - pending.began
        self.last = {
            "step": pending.steps,
            "every_steps": pending.steps - before,
            "seconds": round(seconds, 3),
            "bytes": sum(self.committed.blobs.values()),
            "sent_bytes": sent,
            "mbps": round(8e-6 * sent / max(seconds, 1e-3), 1),
        }
        self._problems.clear()
        self._end(pending)

    def _take_written(self) -> None:
        """What was written is where the job goes on, also where nobody waited for it."""
        writing, self._writing = self._writing, None
        if writing is not None and writing.exception() is None:
            self.committed = writing.result()
            self._log.record.committed = self.committed.steps

    def _failed(self, pending: _Pending, failure: ConfidantError) -> None:
        """The job goes on without this one. Lost devices are told of elsewhere."""
        if self._pending is not pending:
            return
        self._writing = None
        self._pace.took(pending.began, time.monotonic() + 1.0)
        self._end(pending)
        known = failure.message in self._problems or len(self._problems) >= MOST_NOTICES
        if isinstance(failure, PeerLostError) or known:
            _log.info("no checkpoint after %d steps: %s", pending.steps, failure)
            return
        self._problems.add(failure.message)
        text = f"no checkpoint after {pending.steps} steps, the job goes on: {failure.message}"
        place = {"device": self._services.self_id, "name": self._log.record.owner}
        self._log.emit({"event": "notice", "code": "no-checkpoint", "message": text, **place})

    def _end(self, pending: _Pending) -> None:
        """The next snapshot may begin; what this one fetched goes meanwhile."""
        self._pending = None
        self._tasks.start(self._clean_up(pending), f"end-{pending.steps}")

    async def _clean_up(self, pending: _Pending) -> None:
        await pending.tasks.close()
        await self._forget(pending)

    async def _forget(self, pending: _Pending) -> None:
        """A checkpoint has files of its own: what was fetched for it may go from the store."""
        for digest in pending.fetched:
            await asyncio.to_thread(self._services.store.remove, digest)
