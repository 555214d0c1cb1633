"""The stages that this device holds for jobs: grants memory, fetches blobs, runs workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from confidantd.errors import CancelledJobError, ConfidantError, ProtocolError
from confidantd.ids import DeviceId, Digest, JobId, is_job_id
from confidantd.jobs.authority import Right
from confidantd.jobs.grants import Grants, Held, Place
from confidantd.jobs.passing_states import PassingStates
from confidantd.jobs.peers import Peers
from confidantd.jobs.request_checks import check_offer
from confidantd.jobs.spares import SpareKeeper
from confidantd.jobs.speed_book import SpeedBook
from confidantd.jobs.splits import Splits, program_request
from confidantd.jobs.stage_blobs import StageBlobs
from confidantd.jobs.stage_files import StageFiles
from confidantd.jobs.stage_hearer import StageHearer
from confidantd.jobs.stage_process import StageProcess
from confidantd.planner.memory import enforced_bytes
from confidantd.store.blobs import BlobStore
from confidantd.tasks import TaskSet
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    BackendsQuestion,
    Offer,
    OfferAnswer,
    RunningJobs,
    Spares,
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
    Command,
    Connect,
    Export,
    Failed,
    Load,
    Snapshot,
    StageAddress,
    command_from,
    message_map,
)

_log = logging.getLogger(__name__)


class StageHost:
    """Answers `stage.*` requests on this device."""

    def __init__(
        self,
        peers: Peers,
        store: BlobStore,
        home: Path,
        hosts: tuple[str, ...],
        threads: int,
        resources: Callable[[], Awaitable[Resources]],
        address_of: Callable[[DeviceId], str | None],
        granted: Callable[[], None],
        coordinator: Callable[[], DeviceId | None],
        splits: Splits,
        speeds: SpeedBook,
    ) -> None:
        self._peers = peers
        self._store = store
        self._blobs = StageBlobs(peers, store)
        self._home, self._files = home, StageFiles(home)
        self._hosts = hosts
        self._threads = threads
        self._resources = resources
        self._address_of = address_of
        self._grants_changed = granted
        self._splits = splits
        self._speeds = speeds
        self._grants = Grants()
        self._spares = SpareKeeper(peers, store)
        self._states = PassingStates(store, self._written_states)
        self._released = asyncio.Event()  # since it was cleared
        self._deciding = asyncio.Lock()  # two offers at once must not get the same memory
        self._tasks = TaskSet("stages")
        peers.authority.decide(Right.COORDINATOR, lambda device, _: device == coordinator())
        peers.authority.decide(Right.OFFERER, self._grants.made_by)
        peers.authority.decide(Right.OWNER, self._grants.owned_by)
        peers.on_request("stage.offer", self._offer)
        peers.on_request("stage.backends", self._backends)
        peers.on_request("stage.withdraw", self._withdraw)
        peers.on_request("stage.start", self._start)
        peers.on_request("stage.command", self._command)
        peers.on_request("stage.spares", self._keep_spares)
        peers.on_request("stage.stop", self._stop)
        peers.on_notify("job.running", self._still_running)
        peers.on_notify("stage.pulse", lambda _device, _params: None)

    def granted_bytes(self) -> int:
        """Memory promised to jobs on this device; to be asked on the event loop."""
        self._forget_expired()
        return self._grants.bytes()

    def jobs(self) -> tuple[JobId, ...]:
        """Jobs that hold a stage here."""
        return tuple({held.offer.job: None for held in self._grants})

    def trains_for_others(self) -> bool:
        """Whether a stage of another device's training is here: it may be moved."""
        return any(
            held.offer.owner != self._peers.self_id
            and held.process is not None
            and held.process.assignment is not None
            and held.process.assignment.spec.training is not None
            for held in self._grants
        )

    async def wait_for_hand_over(self) -> None:
        """Until there is none."""
        while self.trains_for_others():
            self._released.clear()
            await self._released.wait()

    def owner_lost(self, device: DeviceId) -> None:
        """Free every stage whose owner is gone: nobody would ever stop it."""
        for held in self._grants.of_owner(device):
            job = held.offer.job
            _log.warning("job %s: its owner is gone; its stage here ends", job)
            self._tasks.start(self._release(held), f"release-{job}")

    def _still_running(self, owner: DeviceId, params: dict[str, Any]) -> None:
        """Free the stages of jobs, or of their epochs, that are over."""
        epochs = from_map(RunningJobs, params).epochs
        for held in self._grants.of_owner(owner):
            epoch = (held.next_offer or held.offer).epoch
            running = epochs.get(held.offer.job)
            if held.process is not None and (running is None or epoch < running):
                self._tasks.start(self._release(held), f"release-{held.offer.job}")

    async def close(self) -> None:
        """End every worker."""
        for held in self._grants:
            await self._release(held)
        await self._spares.close()
        await self._tasks.close()
        await self._states.close()

    async def _offer(self, coordinator: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        offer = from_map(Offer, params)
        self._forget_expired()
        if not is_job_id(offer.job):
            raise ProtocolError("an offer has no proper job id")
        check_offer(offer)
        async with self._deciding:
            return to_map(await self._decide(offer, coordinator))

    async def _decide(self, offer: Offer, coordinator: DeviceId) -> OfferAnswer:
        """Grant the memory, or decline with what there is, or why this device takes no new work
        for others now.
        """
        running = self._grants.check(offer)
        resources = await self._resources()
        free = resources.available_bytes + (running.memory_bytes if running else 0)
        if resources.refuses and offer.owner != self._peers.self_id and running is None:
            return OfferAnswer(False, free, resources.refuses, refuses=True)
        if offer.memory_bytes > free:
            return OfferAnswer(False, free, "not enough memory is available now")
        self._grants.grant(offer, coordinator, asyncio.get_running_loop().time())
        self._grants_changed()
        return OfferAnswer(True, free)

    async def _backends(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        question = from_map(BackendsQuestion, params)
        answer = await asyncio.to_thread(self._splits.answer, question.programs, question.form)
        return to_map(answer)

    async def _withdraw(self, coordinator: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        """Free grants that the final plan does not use; only who made the offers may."""
        message = from_map(StopStage, params)
        self._grants.withdraw(message.job, message.epoch, coordinator)
        self._grants_changed()
        return {}

    async def _start(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        assignment = from_map(StageAssignment, params)
        self._spares.drop(assignment.job)  # what it waits for may be what this needs
        place = Place(assignment.job, assignment.epoch, assignment.stage)
        held = self._grants.starting(owner, place)
        assignment = replace(
            assignment, threads=self._threads, memory_bytes=held.offer.memory_bytes
        )
        digests = {entry.digest for entry in assignment.state}
        async with self._states.reading(digests):
            try:
                blobs = await self._blobs.fetch(owner, assignment)
                started = await self._start_worker(held, assignment, blobs)
            except BaseException:
                await self._release(held)
                raise
        self._grants.started(held)
        self._grants_changed()
        return to_map(started)

    async def _start_worker(
        self, held: Held, assignment: StageAssignment, blobs: dict[Digest, BlobRange]
    ) -> StageStarted:
        if held.process is None:
            log = self._home / "logs" / f"worker-{assignment.job}-{assignment.stage}.log"
            turns = self._files.turns(held.offer.job)
            await asyncio.to_thread(turns.parent.mkdir, parents=True, exist_ok=True)
            await asyncio.to_thread(self._speeds.begin, assignment)
            _check_wanted(held)
            hear = StageHearer(self._peers, self._store, self._speeds, held).hear
            held.process = await StageProcess.start(log, hear)
            self._tasks.start(self._attend(held, held.process), f"events-{assignment.job}")
        resources = await self._resources()
        _check_wanted(held)  # else the release that came meanwhile ends the process
        limit = enforced_bytes(assignment.memory_bytes, resources.available_bytes)
        return await held.process.load(self._load(assignment, blobs, limit))

    async def _attend(self, held: Held, process: StageProcess) -> None:
        """Hear the worker to its end; what it held is free then."""
        try:
            await process.run()
        except ConfidantError as failure:  # what it wrote could not be kept here
            place = process.assignment
            if place is not None:
                failed = message_map(Failed(**failure.to_wire()))
                message = StageEvent(place.job, place.epoch, place.stage, failed)
                await self._peers.notify(held.offer.owner, "stage.event", to_map(message))
        if not held.released:
            await self._release(held)

    def _load(
        self, assignment: StageAssignment, blobs: dict[Digest, BlobRange], limit_bytes: int
    ) -> Load:
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
            str(self._files.turns(assignment.job)),
            limit_bytes,
        )

    async def _command(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(StageCommand, params)
        held = self._grants.find(owner, Place(message.job, message.epoch, message.stage))
        if held.process is None:
            raise ProtocolError(f"job {message.job} has no worker here yet")
        command = await self._localised(command_from(message.command), held)
        if isinstance(command, Connect):  # all state was taken over by then
            for left in self._grants.before(owner, message.job, message.epoch):
                await self._release(left)
        await held.process.send(command)
        return {}

    async def _localised(self, command: Command, held: Held) -> Command:
        """Fill in what only this device knows: addresses as seen from here, folders."""
        if isinstance(command, Load):
            raise ProtocolError("only the device itself loads a stage")
        if isinstance(command, Connect):
            return Connect(tuple(self._seen_from_here(a) for a in command.stages))
        if isinstance(command, Export):  # others have taken what was exported before
            await self._forget_trained(held)
        if isinstance(command, Snapshot):
            await self._forget_snapshots(held, command.keep)
        if isinstance(command, Collect | Export | Snapshot):
            folder = self._files.trained(held)
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            return replace(command, folder=str(folder))
        return command

    def _seen_from_here(self, address: StageAddress) -> StageAddress:
        """The address of this device's own connection to the peer beats the owner's view of it."""
        host = self._address_of(address.device)
        return replace(address, host=host) if host else address

    async def _keep_spares(self, _owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        spares = from_map(Spares, params)
        if any(tensor.bytes <= 0 for tensor in spares.tensors):
            raise ProtocolError("spare weights of impossible sizes are asked for")
        if spares.job in self.jobs():
            self._spares.keep(spares)
        return {}

    async def _stop(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(StopStage, params)
        self._grants.drop(owner, message.job, message.epoch)
        for held in self._grants.of_epoch(owner, message.job, message.epoch):
            await self._release(held)
        return {}

    async def _release(self, held: Held) -> None:
        """To its end, also where who asked for it goes meanwhile."""
        name = f"release-{held.offer.job}"
        await asyncio.shield(self._tasks.start(self._free(held), name))

    async def _free(self, held: Held) -> None:
        self._grants.remove(held)
        if held.process is not None:
            await asyncio.shield(held.process.stop())
            await held.process.heard()
            if held.process.assignment is not None:
                await asyncio.to_thread(self._speeds.save, held.process.assignment)
        await self._forget_trained(held)
        await self._forget_snapshots(held, ())
        self._grants_changed()
        job = held.offer.job
        last = job not in self.jobs()
        if last:
            self._spares.drop(job)
        await asyncio.to_thread(self._files.remove, held, last=last)
        self._released.set()

    def _written_states(self) -> set[Digest]:
        return {digest for held in self._grants for digest in held.blobs}

    async def _forget_trained(self, held: Held) -> None:
        trained = set(held.trained)
        held.trained.clear()
        await self._states.drop(trained)

    async def _forget_snapshots(self, held: Held, keep: tuple[int, ...]) -> None:
        """All but those."""
        going = {steps: found for steps, found in held.snapshots.items() if steps not in keep}
        for steps in going:
            del held.snapshots[steps]
        await self._states.drop(set().union(*going.values()))

    def _forget_expired(self) -> None:
        self._grants.forget_expired(asyncio.get_running_loop().time())


def _check_wanted(held: Held) -> None:
    if held.released:
        raise CancelledJobError(f"job {held.offer.job} was stopped while its stage was loaded here")
