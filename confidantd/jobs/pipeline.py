"""The owner's view of a running pipeline: start every stage, command them, hear their events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from confidantd.errors import ConfidantError, PeerLostError, WorkerError, from_wire
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.authority import Right
from confidantd.jobs.peers import Peers
from confidantd.jobs.stage_notes import Note, StageNotes
from confidantd.store.blobs import BlobStore
from confidantd.store.fetch import fetch
from confidantd.tasks import TaskSet
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    Pulse,
    RunningJobs,
    StageCommand,
    StageEvent,
    StageProgress,
    StageStarted,
    StopStage,
)
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import (
    Command,
    Connect,
    Connected,
    Event,
    Failed,
    Interrupted,
    StageAddress,
    TrainedTensor,
    event_from,
    message_map,
)

START_SECONDS = 3_600.0  # distributing a large stage over slow Wi-Fi; progress is shown meanwhile
COMMAND_SECONDS = 60.0
CONNECT_SECONDS = 60.0
STOP_SECONDS = 10.0
PULSE_SECONDS = 0.25
CAUSE_SECONDS = 0.5  # a link breaks: until then we hear which worker or device is gone
MAX_WAITING_EVENTS = 10_000

Progress = Callable[[StageProgress], None]


@dataclass(frozen=True, slots=True)
class Placed:
    """A stage and the device that holds it, at the address the owner knows."""

    device: DeviceId
    host: str
    assignment: StageAssignment
    goes_on: bool = False  # from a running stage of the job's last epoch


class PipelineRouter:
    """Brings `stage.event` and `stage.progress` notifications to the pipeline they belong to."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._tasks = TaskSet("router")
        self._pipelines: dict[tuple[JobId, int], Pipeline] = {}
        peers.authority.decide(Right.HOLDER, self._held_by)
        peers.on_notify("stage.event", self._event)
        peers.on_notify("stage.progress", self._progress)

    def add(self, pipeline: Pipeline) -> None:
        """Route to `pipeline` from now on."""
        self._pipelines[pipeline.key] = pipeline

    def remove(self, pipeline: Pipeline) -> None:
        """Drop what still comes for `pipeline`."""
        self._pipelines.pop(pipeline.key, None)

    def device_met(self, device: DeviceId) -> None:
        """It may still hold stages of epochs that are over: the connection broke in between."""
        epochs: dict[JobId, int] = {}
        for job, epoch in self._pipelines:
            epochs[job] = min(epoch, epochs.get(job, epoch))
        message = to_map(RunningJobs(epochs))
        self._tasks.start(self._peers.notify(device, "job.running", message), "met")

    async def close(self) -> None:
        """Tell nobody anything any more."""
        await self._tasks.close()

    def device_lost(self, device: DeviceId, name: str) -> None:
        """Fail every pipeline that has a stage on `device`."""
        for pipeline in list(self._pipelines.values()):
            pipeline.device_lost(device, name)

    def _held_by(self, device: DeviceId, params: Mapping[str, Any]) -> bool:
        job, epoch, stage = (params.get(key) for key in ("job", "epoch", "stage"))
        if not (isinstance(job, str) and isinstance(epoch, int) and isinstance(stage, int)):
            return False
        pipeline = self._pipelines.get((JobId(job), epoch))
        return pipeline is not None and pipeline.holds(stage, device)

    def _event(self, _device: DeviceId, params: dict[str, Any]) -> None:
        message = from_map(StageEvent, params)
        pipeline = self._pipelines.get((message.job, message.epoch))
        if pipeline is not None:
            pipeline.put(message.stage, event_from(message.event))

    def _progress(self, _device: DeviceId, params: dict[str, Any]) -> None:
        message = from_map(StageProgress, params)
        pipeline = self._pipelines.get((message.job, message.epoch))
        if pipeline is not None:
            pipeline.progress(message)


class Pipeline:
    """All stages of one job in one epoch; may only be used once."""

    def __init__(
        self,
        peers: Peers,
        router: PipelineRouter,
        stages: list[Placed],
        progress: Progress,
        notes: StageNotes,
    ) -> None:
        first = stages[0].assignment
        self.key = (first.job, first.epoch)
        self.progress = progress
        self.notes = notes
        self._peers = peers
        self._router = router
        self.placed = tuple(stages)
        self._ports: dict[int, int] = {}
        self.failed_stage: tuple[int, ConfidantError] | None = None  # the first that failed
        self.ended_stages: set[int] = set()  # their workers are gone
        self.lost_devices: set[DeviceId] = set()
        self.stopped = False
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(MAX_WAITING_EVENTS)
        self._failure: ConfidantError | None = None
        self._failed = asyncio.Event()
        self._tasks = TaskSet("pipeline")

    def __len__(self) -> int:
        return len(self.placed)

    def holds(self, stage: int, device: DeviceId) -> bool:
        """Whether `device` was given `stage`."""
        return 0 <= stage < len(self.placed) and self.placed[stage].device == device

    def put(self, stage: int, event: Event) -> None:
        """Take an event of a stage; a `Failed` ends every wait."""
        if isinstance(event, Failed):
            self.ended_stages.add(stage)
            self._stage_failed(stage, from_wire(to_map(event)))
            return
        if isinstance(event, Interrupted):
            asyncio.get_running_loop().call_later(
                CAUSE_SECONDS, self._fail, from_wire(to_map(event))
            )
            return
        if isinstance(event, Note):
            self.notes.add(stage, event)
            return
        try:
            self._events.put_nowait((stage, event))
        except asyncio.QueueFull:
            self._fail(WorkerError(f"stage {stage} sends more events than its job takes"))

    def _stage_failed(self, stage: int, failure: ConfidantError) -> None:
        """A broken link is a symptom: a moment later we know which device is gone."""
        if isinstance(failure, PeerLostError):
            asyncio.get_running_loop().call_later(CAUSE_SECONDS, self._fail, failure)
        else:
            self.failed_stage = self.failed_stage or (stage, failure)
            self._fail(failure)

    def device_lost(self, device: DeviceId, name: str) -> None:
        """The device is gone; if it holds a stage, the pipeline has failed."""
        if any(placed.device == device for placed in self.placed):
            self.lost_devices.add(device)
            self._fail(
                PeerLostError(
                    f"{name} left while it held a stage of the job",
                    "see `confidant peers`",
                )
            )

    async def start(self) -> None:
        """Load all stages and connect them; raises what failed first."""
        self._open()
        await self._start_those(set(range(len(self))))
        await self._connect()

    async def start_new(self) -> None:
        """Load the stages that do not go on from a running one; raises what failed first."""
        self._open()
        await self._start_those({i for i, placed in enumerate(self.placed) if not placed.goes_on})

    async def start_rest(self) -> None:
        """Load the others, then connect all."""
        await self._start_those({i for i, placed in enumerate(self.placed) if placed.goes_on})
        await self._connect()

    def _open(self) -> None:
        self._router.add(self)
        self._tasks.start(self._pulse(), "pulse")

    async def _pulse(self) -> None:
        """Devices that are gone are noticed by what they do not acknowledge."""
        message = to_map(Pulse(self.key[0]))
        devices = {placed.device for placed in self.placed} - {self._peers.self_id}
        while True:
            for device in devices:
                await self._peers.notify(device, "stage.pulse", message)
            await asyncio.sleep(PULSE_SECONDS)

    async def _connect(self) -> None:
        addresses = tuple(
            StageAddress(index, placed.device, placed.host, self._ports[index])
            for index, placed in enumerate(self.placed)
        )
        await self.broadcast(Connect(addresses))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._all_connected()
        except TimeoutError:
            raise PeerLostError(
                f"the stages did not reach each other within {CONNECT_SECONDS:.0f} s",
                "check that no firewall stands between the devices",
            ) from None

    async def _all_connected(self) -> None:
        connected: set[int] = set()
        while len(connected) < len(self.placed):
            stage, event = await self.next_event()
            if isinstance(event, Connected):
                connected.add(stage)

    async def broadcast(self, command: Command) -> None:
        """Send one command to every stage."""
        for stage in range(len(self.placed)):
            await self.command(stage, command)

    async def command(self, stage: int, command: Command) -> None:
        """Send a command to one stage."""
        job, epoch = self.key
        message = StageCommand(job, epoch, stage, message_map(command))
        await self._peers.request(
            self.placed[stage].device,
            "stage.command",
            to_map(message),
            timeout_seconds=COMMAND_SECONDS,
        )

    async def next_event(self) -> tuple[int, Event]:
        """The next event of any stage; raises the failure of the pipeline once there is one."""
        if self._failure is None and not self._events.empty():
            return self._events.get_nowait()
        tasks = TaskSet("pipeline-event")
        getting = tasks.start(self._events.get(), "event")
        failing = tasks.start(self._failed.wait(), "failure")
        try:
            await asyncio.wait({getting, failing}, return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None:
                raise self._failure
            return getting.result()
        finally:
            await tasks.close()

    async def fetch_trained(self, stage: int, tensor: TrainedTensor, store: BlobStore) -> None:
        """Bring a trained tensor from the stage's device into `store`, verified."""
        assert tensor.digest is not None
        device = self.placed[stage].device
        if await asyncio.to_thread(store.locate, tensor.digest) is None:
            await fetch(
                store,
                lambda d, offset, length: self._peers.read_blob(device, d, offset, length),
                tensor.digest,
                4 * math.prod(tensor.shape),
                passing=True,
            )

    @property
    def failed(self) -> bool:
        """Whether it cannot go on."""
        return self._failure is not None

    @property
    def failure(self) -> ConfidantError | None:
        """Why it cannot go on."""
        return self._failure

    async def stop(self) -> None:
        """End every stage that can still be reached and has not gone on to a later epoch."""
        self.stopped = True
        await self._tasks.close()
        self._router.remove(self)
        devices = {placed.device for placed in self.placed} - self.lost_devices
        await stop_stages(self._peers, devices, *self.key)

    async def _start_those(self, stages: set[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for index in stages:
                group.create_task(self._start_stage(index), name=f"start-{index}")

    async def _start_stage(self, stage: int) -> None:
        placed = self.placed[stage]
        try:
            answer = await self._peers.request(
                placed.device,
                "stage.start",
                to_map(placed.assignment),
                timeout_seconds=START_SECONDS,
            )
        except ConfidantError as failure:
            self.failed_stage = self.failed_stage or (stage, failure)
            raise
        self._ports[stage] = from_map(StageStarted, answer).port

    def _fail(self, failure: ConfidantError) -> None:
        self._failure = self._failure or failure
        self._failed.set()


async def stop_stages(peers: Peers, devices: Collection[DeviceId], job: JobId, epoch: int) -> None:
    """End the stages of one epoch of a job, and what is promised for it, where that is possible."""
    message = to_map(StopStage(job, epoch))
    await asyncio.gather(
        *(
            peers.request(device, "stage.stop", message, timeout_seconds=STOP_SECONDS)
            for device in devices
        ),
        return_exceptions=True,
    )
