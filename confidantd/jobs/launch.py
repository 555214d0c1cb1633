"""From a workload to a running pipeline: plan, compile, negotiate, distribute, connect."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from confidantd.errors import ConfidantError, DeviceError, IdentityConflictError
from confidantd.ids import DeviceId
from confidantd.jobs.peers import Peers
from confidantd.jobs.pipeline import Pipeline, PipelineRouter, Placed
from confidantd.jobs.plan_inputs import plan_devices
from confidantd.jobs.programs import Programs
from confidantd.jobs.record import JobLog
from confidantd.jobs.setup import Workload, adapter_names, assignments, stage_names
from confidantd.jobs.stage_notes import StageNotes
from confidantd.models.programs import program_names, worth_splitting
from confidantd.models.safetensors import TensorLocation
from confidantd.planner.costs import PlanDevice
from confidantd.planner.plan import Plan
from confidantd.store.blobs import BlobStore
from confidantd.store.model_index import ModelIndex
from confidantd.swarm.state import CoordinatorView, PeerView
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import Measure, SpeedsAnswer, StageProgress
from confidantd.wire.stage import OptimizerSpec, ProgramEntry, StageSpec, TensorEntry

PLAN_SECONDS = 60.0
MEASURE_SECONDS = 330.0  # each gives up on itself after 300
COORDINATOR_SECONDS = 10.0  # an election takes less than five


class SwarmView(Protocol):
    """What jobs need to know of the swarm."""

    def peers(self) -> tuple[PeerView, ...]: ...

    def conflict(self) -> str | None: ...

    async def wait_for_coordinator(self, timeout_seconds: float) -> CoordinatorView: ...


@dataclass(frozen=True, slots=True)
class JobServices:
    """What a job uses of this device."""

    self_id: DeviceId
    home: Path
    peers: Peers
    swarm: SwarmView
    store: BlobStore
    index: ModelIndex
    programs: Programs
    router: PipelineRouter


@dataclass(frozen=True, slots=True)
class Launched:
    """A pipeline whose stages are loaded and connected."""

    pipeline: Pipeline
    plan: Plan
    specs: tuple[StageSpec, ...]


async def ask_coordinator(
    services: JobServices, method: str, workload: Workload, log: JobLog, devices: tuple[str, ...]
) -> Plan:
    """A plan from the coordinator: `job.plan` only looks, `job.negotiate` reserves."""
    conflict = services.swarm.conflict()
    if conflict is not None:
        raise IdentityConflictError(conflict)
    coordinator = await services.swarm.wait_for_coordinator(COORDINATOR_SECONDS)
    request = workload.plan_request(log.record.id, log.record.epoch, devices)
    answer = await services.peers.request(
        coordinator.id, method, to_map(request), timeout_seconds=PLAN_SECONDS
    )
    return from_map(Plan, answer)


async def launch(
    services: JobServices,
    log: JobLog,
    workload: Workload,
    devices: tuple[str, ...],
    optimizer: OptimizerSpec,
    seed: int,
) -> Launched:
    """Bring up the pipeline of a job; emits `progress` and `plan` events on the way."""
    await ask_coordinator(services, "job.plan", workload, log, devices)  # refuse before compiling
    programs = await _programs(services, log, workload)
    tensors, adapter = await _index(services, log, workload)
    await measure_devices(services, log, workload, devices, programs)
    plan = await ask_coordinator(services, "job.negotiate", workload, log, devices)
    log.record.devices = [stage.name for stage in plan.stages]
    log.emit({"event": "plan", **plan.to_json()})
    await log.save()
    found = assignments(
        workload,
        plan,
        job=log.record.id,
        epoch=log.record.epoch,
        source=services.self_id,
        programs=programs,
        tensors=tensors,
        adapter=adapter,
        optimizer=optimizer,
        seed=seed,
    )
    placed = [
        Placed(stage.device, _host(services.swarm, stage.device), assignment)
        for stage, assignment in zip(plan.stages, found, strict=True)
    ]
    notes = StageNotes(log, plan)
    progress = _StageProgressLog(log).add
    pipeline = Pipeline(services.peers, services.router, placed, progress, notes)
    try:
        await pipeline.start()
    except BaseException:
        await asyncio.shield(pipeline.stop())
        raise
    return Launched(pipeline, plan, tuple(a.spec for a in found))


async def _programs(
    services: JobServices, log: JobLog, workload: Workload
) -> dict[str, ProgramEntry]:
    """The programs of whole blocks, and of parts where a device could share blocks out."""

    def progress(name: str, done: int, of: int) -> None:
        emit_progress(log, "compile", done, of, name)

    request, others = workload.program_request(), compilers(services.swarm)
    found = await services.programs.get(request, others, progress)
    peers = [p for p in services.swarm.peers() if p.is_self or p.state == "alive"]
    several = any(p.resources is not None and len(p.resources.backends) > 1 for p in peers)
    if several and worth_splitting(request):
        parts = replace(request, split=True)
        found = found | await services.programs.get(parts, others, progress)
    return found


async def measure_devices(
    services: JobServices,
    log: JobLog,
    workload: Workload,
    devices: tuple[str, ...],
    programs: dict[str, ProgramEntry],
) -> None:
    """Every device that may get a stage measures blocks of this shape, if it never did.

    Small blocks are not worth it: what the first steps of a job show is remembered, too.
    """
    request = workload.program_request()
    if not worth_splitting(request):
        return
    wanted = plan_devices(services.swarm.peers(), devices)
    names = set(program_names(request))
    own = {name: entry for name, entry in programs.items() if name in names}
    message = to_map(Measure(request, own, services.self_id))
    done = 0

    async def one(device: PlanDevice) -> None:
        nonlocal done
        try:
            answer = await services.peers.request(
                device.id, "device.measure", message, timeout_seconds=MEASURE_SECONDS
            )
            reason = from_map(SpeedsAnswer, answer).reason
        except ConfidantError as failure:
            reason = failure.message
        if reason:
            text = f"{device.name} could not be measured and is planned for by guess ({reason})"
            log.emit({"event": "notice", "code": "not-measured", "message": text,
                      "device": device.id, "name": device.name})  # fmt: skip
        done += 1
        emit_progress(log, "measure", done, len(wanted), "devices")

    emit_progress(log, "measure", 0, len(wanted), "devices")
    await asyncio.gather(*(one(device) for device in wanted))


def emit_progress(log: JobLog, phase: str, done: int, of: int, detail: str = "") -> None:
    """One `progress` event."""
    log.emit({"event": "progress", "phase": phase, "done": done, "of": of, "detail": detail})


def compilers(swarm: SwarmView) -> list[DeviceId]:
    """Other devices that are alive and can compile, the fastest first."""
    able = [
        peer
        for peer in swarm.peers()
        if not peer.is_self
        and peer.state == "alive"
        and peer.resources is not None
        and "compiler" in peer.resources.roles
    ]
    able.sort(key=lambda peer: -(peer.resources.gflops if peer.resources else 0.0))
    return [peer.id for peer in able]


async def _index(
    services: JobServices, log: JobLog, workload: Workload
) -> tuple[Mapping[str, TensorEntry], Mapping[str, TensorEntry]]:
    """Digests of the tensors that any stage needs, and of the adapter's."""
    whole = StageSpec(
        workload.spec, 0, workload.spec.layers, True, True, workload.method, workload.lora
    )
    emit_progress(log, "distribute", 0, 1, "reading the model")
    tensors = await _entries(services, workload.model.tensors, stage_names(whole))
    names = tuple(name for name in adapter_names(whole) if name in workload.adapter)
    return tensors, await _entries(services, workload.adapter, names)


async def _entries(
    services: JobServices, locations: Mapping[str, TensorLocation], names: tuple[str, ...]
) -> dict[str, TensorEntry]:
    entries = await asyncio.to_thread(services.index.entries, locations, names)
    return {entry.name: entry for entry in entries}


def _host(swarm: SwarmView, device: DeviceId) -> str:
    for peer in swarm.peers():
        if peer.id == device:
            return peer.address.rpartition(":")[0] if peer.address else "127.0.0.1"
    raise DeviceError("a device of the plan left before the job began", "start again")


class _StageProgressLog:
    """Sums what the stages report into one `progress` event per phase."""

    def __init__(self, log: JobLog) -> None:
        self._log = log
        self._latest: dict[int, StageProgress] = {}

    def add(self, progress: StageProgress) -> None:
        """Take one stage's report."""
        self._latest[progress.stage] = progress
        done = sum(p.done for p in self._latest.values())
        of = sum(p.of for p in self._latest.values())
        emit_progress(self._log, progress.phase, done, of, "bytes")


def failure_event(failure: Any) -> dict[str, Any]:
    """The `failed` event of an error."""
    return {"event": "failed", **failure.to_wire()}
