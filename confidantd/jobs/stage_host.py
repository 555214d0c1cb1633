"""The stages that this device holds for jobs: grants memory, fetches blobs, runs workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from confidantd.errors import (
    ProtocolError,
    StaleEpochError,
    WorkerError,
    from_wire,
)
from confidantd.ids import DeviceId, Digest, JobId, is_job_id
from confidantd.jobs.peers import Peers
from confidantd.jobs.speeds import SpeedBook
from confidantd.jobs.splits import Splits, program_request
from confidantd.jobs.stage_blobs import StageBlobs
from confidantd.jobs.worker_process import WorkerProcess
from confidantd.store.blobs import BlobStore
from confidantd.tasks import TaskSet
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    BackendsQuestion,
    Offer,
    OfferAnswer,
    StageCommand,
    StageEvent,
    StageStarted,
    StopStage,
)
from confidantd.wire.resources import Resources
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import (
    BlobRange,
    Collect,
    Collected,
    Command,
    Connect,
    Event,
    Export,
    Exported,
    Failed,
    Listening,
    Load,
    Loaded,
    Measuring,
    StageAddress,
    StepDone,
    command_from,
    message_map,
)

_log = logging.getLogger(__name__)

OFFER_SECONDS = 120.0  # a granted offer that is not started by then is forgotten
LOAD_SECONDS = 300.0  # a phone reads a 1 GB stage from its flash in about a minute
MAX_REMEMBERED_EPOCHS = 1_000


@dataclass(slots=True)
class HeldStage:
    """One granted stage; `process` is there once it was started.

    `next_offer` is granted to the same job for its next epoch: the running process then goes
    on as another stage.
    """

    offer: Offer
    coordinator: DeviceId
    expires: float
    process: WorkerProcess | None = None
    next_offer: Offer | None = None
    started: dict[type[Event], asyncio.Future[Event]] = field(default_factory=dict)
    trained: list[Digest] = field(default_factory=list)
    limit: asyncio.Timeout | None = None
    assignment: StageAssignment | None = None
    steps: int = 0  # done since the stage began

    @property
    def memory_bytes(self) -> int:
        """What is set aside for it."""
        following = self.next_offer.memory_bytes if self.next_offer else 0
        return max(self.offer.memory_bytes, following)

    def go_on(self) -> None:
        """A stage that measures its backends is at work: its time to load begins anew."""
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time() + LOAD_SECONDS)


class StageHost:
    """Answers `stage.*` requests on this device."""

    def __init__(
        self,
        peers: Peers,
        store: BlobStore,
        home: Path,
        hosts: tuple[str, ...],
        threads: int,
        resources: Callable[[], Resources],
        address_of: Callable[[DeviceId], str | None],
        granted: Callable[[], None],
        coordinator: Callable[[], DeviceId | None],
        splits: Splits,
        speeds: SpeedBook,
    ) -> None:
        self._peers = peers
        self._store = store
        self._blobs = StageBlobs(peers, store)
        self._home = home
        self._hosts = hosts
        self._threads = threads
        self._resources = resources
        self._address_of = address_of
        self._grants_changed = granted
        self._coordinator = coordinator
        self._splits = splits
        self._speeds = speeds
        self._held: dict[JobId, HeldStage] = {}
        self._epochs: dict[JobId, int] = {}
        self._deciding = asyncio.Lock()  # two offers at once must not get the same memory
        self._tasks = TaskSet("stages")
        self._handle("stage.offer", self._offer)
        self._handle("stage.backends", self._backends)
        self._handle("stage.withdraw", self._withdraw)
        self._handle("stage.start", self._start)
        self._handle("stage.command", self._command)
        self._handle("stage.stop", self._stop)

    def _handle(
        self, method: str, handler: Callable[[DeviceId, dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> None:
        self._peers.on_request(method, handler)

    def granted_bytes(self) -> int:
        """Memory promised to jobs on this device."""
        self._forget_expired()
        return sum(held.memory_bytes for held in self._held.values())

    def jobs(self) -> tuple[JobId, ...]:
        """Jobs that hold a stage here."""
        return tuple(self._held)

    def owner_lost(self, device: DeviceId) -> None:
        """Free every stage whose owner is gone: nobody would ever stop it."""
        for job, held in list(self._held.items()):
            if held.offer.owner == device:
                _log.warning("job %s: its owner is gone; its stage here ends", job)
                self._tasks.start(self._release(job), f"release-{job}")

    async def close(self) -> None:
        """End every worker."""
        for job in list(self._held):
            await self._release(job)
        await self._tasks.close()

    async def _offer(self, coordinator: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        offer = from_map(Offer, params)
        self._forget_expired()
        if not is_job_id(offer.job):
            raise ProtocolError("an offer has no proper job id")
        if coordinator != self._coordinator():
            return to_map(OfferAnswer(False, 0, "it follows another coordinator", refuses=True))
        if offer.epoch < self._epochs.get(offer.job, 0):
            raise StaleEpochError(f"job {offer.job} is already in a later epoch here")
        async with self._deciding:
            return to_map(await self._decide(offer, coordinator))

    async def _decide(self, offer: Offer, coordinator: DeviceId) -> OfferAnswer:
        """Grant the memory, or decline with what there is, or why this device takes no new work
        for others now; a newer epoch replaces an older one.
        """
        held = self._held.get(offer.job)
        running = held is not None and held.process is not None
        if held is not None and running:
            if offer.epoch == held.offer.epoch:
                raise StaleEpochError(f"job {offer.job} already runs here in epoch {offer.epoch}")
            if offer.owner != held.offer.owner:
                raise ProtocolError(f"job {offer.job} belongs to another device")
        resources = await asyncio.to_thread(self._resources)
        free = resources.available_bytes + (held.memory_bytes if held else 0)
        if resources.refuses and offer.owner != self._peers.self_id and not running:
            return OfferAnswer(False, free, resources.refuses, refuses=True)
        if offer.memory_bytes > free:
            return OfferAnswer(False, free, "not enough memory is available now")
        self._epochs[offer.job] = offer.epoch
        while len(self._epochs) > MAX_REMEMBERED_EPOCHS:
            self._epochs.pop(next(iter(self._epochs)))
        expires = asyncio.get_running_loop().time() + OFFER_SECONDS
        if held is not None and running:
            held.next_offer, held.coordinator, held.expires = offer, coordinator, expires
        else:
            self._held[offer.job] = HeldStage(offer, coordinator, expires)
        self._grants_changed()
        return OfferAnswer(True, free)

    async def _backends(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        question = from_map(BackendsQuestion, params)
        answer = await asyncio.to_thread(self._splits.answer, question.programs, question.form)
        return to_map(answer)

    async def _withdraw(self, coordinator: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        """Free a grant that the final plan does not use; only who made the offer may."""
        message = from_map(StopStage, params)
        held = self._held.get(message.job)
        if held is not None and held.coordinator == coordinator:
            if held.process is None:
                await self._release(message.job)
            elif held.next_offer is not None and held.next_offer.epoch == message.epoch:
                self._keep_as_it_is(held)
        return {}

    def _keep_as_it_is(self, held: HeldStage) -> None:
        """A running stage gets no other one after all."""
        held.next_offer, held.expires = None, float("inf")
        self._grants_changed()

    async def _start(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        assignment = from_map(StageAssignment, params)
        held = self._following(owner, assignment)
        held.expires = float("inf")
        assignment = replace(
            assignment, threads=self._threads, memory_bytes=held.offer.memory_bytes
        )
        try:
            blobs = await self._blobs.fetch(owner, assignment)
            return to_map(await self._start_worker(held, assignment, blobs))
        except BaseException:
            await self._release(assignment.job)
            raise

    async def _start_worker(
        self, held: HeldStage, assignment: StageAssignment, blobs: dict[Digest, BlobRange]
    ) -> StageStarted:
        loop = asyncio.get_running_loop()
        held.started = {kind: loop.create_future() for kind in (Listening, Loaded)}
        held.assignment, held.steps = assignment, 0
        if held.process is None:
            log = self._home / "logs" / f"worker-{assignment.job}.log"
            held.process = await WorkerProcess.start(log)
            await asyncio.to_thread(self._speeds.begin, assignment)
            self._tasks.start(self._pump(held, held.process), f"events-{assignment.job}")
        await held.process.send(self._load(assignment, blobs))
        try:
            async with asyncio.timeout(LOAD_SECONDS) as held.limit:
                listening = await held.started[Listening]
                loaded = await held.started[Loaded]
        except TimeoutError:
            raise WorkerError(f"the stage did not load within {LOAD_SECONDS:.0f} s") from None
        finally:
            held.limit = None
        assert isinstance(listening, Listening)
        assert isinstance(loaded, Loaded)
        return StageStarted(listening.port, loaded.resident_bytes)

    def _load(self, assignment: StageAssignment, blobs: dict[Digest, BlobRange]) -> Load:
        spec, splits = assignment.spec, self._splits
        file = splits.file(program_request(spec), spec.form)
        return Load(
            assignment,
            str(self._home),
            self._hosts,
            blobs,
            ("cpu",) if assignment.cpu_only else splits.backends(),
            splits.split,
            str(file),
        )

    async def _pump(self, held: HeldStage, process: WorkerProcess) -> None:
        """Pass the worker's events on to the job's owner, in order."""
        async for event in process.events():
            assignment = held.assignment
            assert assignment is not None
            if isinstance(event, Measuring):
                held.go_on()
            waiter = held.started.get(type(event))
            if waiter is not None and not waiter.done():
                waiter.set_result(event)
                continue
            if isinstance(event, Failed) and self._fail_start(held, event):
                continue
            if isinstance(event, StepDone):
                self._observe(held, assignment, event)
            told: Event = event
            if isinstance(event, Collected | Exported):
                told = await self._store_trained(held, event)
            message = StageEvent(
                assignment.job, assignment.epoch, assignment.stage, message_map(told)
            )
            await self._peers.notify(held.offer.owner, "stage.event", to_map(message))

    def _observe(self, held: HeldStage, assignment: StageAssignment, step: StepDone) -> None:
        """Learn from a step; the first one also fills memory and says nothing."""
        if held.steps:
            self._speeds.observe(assignment, step)
        held.steps += 1

    def _fail_start(self, held: HeldStage, event: Failed) -> bool:
        """Give a failure to `_start_worker` if it still waits; False if nobody does."""
        waiting = [future for future in held.started.values() if not future.done()]
        for future in waiting:
            future.set_exception(from_wire(to_map(event)))
            future.exception()  # a second waiter may never look: not worth a warning
        return bool(waiting)

    async def _store_trained(self, held: HeldStage, found: Collected | Exported) -> Event:
        """Trained tensors become blobs, for others to fetch until the stage is released."""
        tensors = []
        for tensor in found.tensors:
            digest = await asyncio.to_thread(self._store.put_file, Path(tensor.path))
            held.trained.append(digest)
            tensors.append(replace(tensor, path="", digest=digest))
        return replace(found, tensors=tuple(tensors))

    async def _command(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(StageCommand, params)
        held = self._granted(owner, message.job, message.epoch)
        if held.process is None:
            raise ProtocolError(f"job {message.job} has no worker here yet")
        command = await self._localised(command_from(message.command), message.job)
        await held.process.send(command)
        return {}

    async def _localised(self, command: Command, job: JobId) -> Command:
        """Fill in what only this device knows: addresses as seen from here, folders."""
        if isinstance(command, Load):
            raise ProtocolError("only the device itself loads a stage")
        if isinstance(command, Connect):
            return Connect(tuple(self._seen_from_here(a) for a in command.stages))
        if isinstance(command, Export):  # others have taken what was exported before
            await self._forget_trained(self._held[job])
        if isinstance(command, Collect | Export):
            folder = self._home / "jobs" / job / "trained"
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            return replace(command, folder=str(folder))
        return command

    def _seen_from_here(self, address: StageAddress) -> StageAddress:
        """The address of this device's own connection to the peer beats the owner's view of it."""
        host = self._address_of(address.device)
        return replace(address, host=host) if host else address

    async def _stop(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(StopStage, params)
        if message.job in self._held:
            self._granted(owner, message.job, message.epoch)
            await self._release(message.job)
        return {}

    def _granted(self, owner: DeviceId, job: JobId, epoch: int) -> HeldStage:
        """The stage granted to `owner`; refuses anybody else and any other epoch."""
        held = self._held.get(job)
        if held is None or held.offer.owner != owner:
            raise ProtocolError(f"this device holds no stage of job {job} for that owner")
        if held.offer.epoch != epoch:
            raise StaleEpochError(f"job {job} is in epoch {held.offer.epoch} here, not {epoch}")
        return held

    def _following(self, owner: DeviceId, assignment: StageAssignment) -> HeldStage:
        """The stage to start, or the running one that is to go on as the next one."""
        job, held = assignment.job, self._held.get(assignment.job)
        if held is None or held.process is None or held.next_offer is None:
            held = self._granted(owner, job, assignment.epoch)
            if held.process is not None:
                raise ProtocolError(f"job {job} already runs here")
            return held
        if held.offer.owner != owner:
            raise ProtocolError(f"this device holds no stage of job {job} for that owner")
        if held.next_offer.epoch != assignment.epoch:
            raise StaleEpochError(f"job {job} is offered epoch {held.next_offer.epoch} here")
        held.offer, held.next_offer = held.next_offer, None
        return held

    async def _release(self, job: JobId) -> None:
        held = self._held.pop(job, None)
        if held is not None and held.process is not None:
            await asyncio.shield(held.process.stop())
        if held is not None and held.assignment is not None and held.steps > 1:
            await asyncio.to_thread(self._speeds.save, held.assignment)
        if held is not None:
            await self._forget_trained(held)
        self._grants_changed()
        folder = self._home / "jobs" / job / "trained"
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_remove_folder, folder)

    async def _forget_trained(self, held: HeldStage) -> None:
        for digest in held.trained:
            await asyncio.to_thread(self._store.remove, digest)
        held.trained.clear()

    def _forget_expired(self) -> None:
        with contextlib.suppress(RuntimeError):
            now = asyncio.get_running_loop().time()
            for job, held in [(j, h) for j, h in self._held.items() if h.expires < now]:
                if held.process is None:
                    del self._held[job]
                else:
                    self._keep_as_it_is(held)


def _remove_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
