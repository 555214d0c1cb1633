"""What a job needs before it can be planned for good: programs, digests, measured devices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId, digest_of
from confidantd.jobs.assign import Material
from confidantd.jobs.moving import Wanted
from confidantd.jobs.plan_inputs import plan_devices
from confidantd.jobs.programs import Progress
from confidantd.jobs.record import JobLog
from confidantd.jobs.services import JobServices, SwarmView, emit_progress
from confidantd.jobs.setup import Workload
from confidantd.models.programs import program_names, worth_splitting
from confidantd.models.quantisation import quantised_matrices
from confidantd.models.safetensors import TensorLocation
from confidantd.models.spec import ProgramRequest
from confidantd.models.stage_parts import stage_parts
from confidantd.models.tensors import head_sources
from confidantd.planner.costs import PlanDevice
from confidantd.swarm.state import PeerView
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import Measure, SpeedsAnswer
from confidantd.wire.stage import ProgramEntry, TensorEntry

MEASURE_SECONDS = 330.0  # each gives up on itself after 300


async def prepare(
    services: JobServices, log: JobLog, workload: Workload, devices: tuple[str, ...]
) -> Material:
    """All of it; emits `progress` events on the way."""
    programs = await _programs(services, log, workload)
    tensors, adapter = await _index(services, log, workload)
    await measure_devices(services, log, workload, devices, programs)
    return Material(programs, tensors, adapter)


async def fingerprint(services: JobServices, log: JobLog, workload: Workload) -> str:
    """SHA-256 of all that a job trains on, but for its text: the model, the adapter it begins
    with, and what is trained of them.
    """
    tensors, adapter = await _index(services, log, workload)
    digests = {name: e.digest for found in (tensors, adapter) for name, e in found.items()}
    lora = None if workload.lora is None else to_map(workload.lora)
    whole = [digests, to_map(workload.spec), workload.method, lora, workload.sequence_length]
    return digest_of(json.dumps(whole, sort_keys=True).encode())


async def _programs(
    services: JobServices, log: JobLog, workload: Workload
) -> dict[str, ProgramEntry]:
    """The programs of whole blocks, and of parts where a device could share blocks out.

    Stages that generate write their program themselves: only what shares blocks out needs some,
    and where nobody can compile, nothing does.
    """

    def progress(name: str, done: int, of: int) -> None:
        emit_progress(log, "compile", done, of, name)

    request, others = workload.program_request(), compilers(services.swarm)
    peers = [p for p in services.swarm.peers() if p.is_self or p.state == "alive"]
    several = any(p.resources is not None and len(p.resources.backends) > 1 for p in peers)
    split = several and worth_splitting(request)
    if workload.method is not None:
        return await _compiled(services, request, split, progress)
    if not split or workload.spec.quantised or not services.programs.possible(others):
        return {}
    try:
        return await _compiled(services, request, split, progress)
    except ConfidantError as failure:
        text = f"blocks are not shared out over backends ({failure.message})"
        log.emit({"event": "notice", "code": "not-shared-out", "message": text,
                  "device": services.self_id, "name": workload.model.source.name})  # fmt: skip
        return {}


async def _compiled(
    services: JobServices, request: ProgramRequest, split: bool, progress: Progress
) -> dict[str, ProgramEntry]:
    others = compilers(services.swarm)
    found = await services.programs.get(request, others, progress)
    if split:
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
    wanted = plan_devices(services.swarm.peers(), devices, {services.self_id})
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


def compilers(swarm: SwarmView) -> list[DeviceId]:
    """Other devices that are alive and can compile: those that take work, then the fastest first.

    One that takes none is asked last: programs are compiled once, and without them nothing runs.
    """
    able = [
        peer
        for peer in swarm.peers()
        if not peer.is_self
        and peer.state == "alive"
        and peer.resources is not None
        and "compiler" in peer.resources.roles
    ]

    def place(peer: PeerView) -> tuple[bool, float]:
        assert peer.resources is not None
        return bool(peer.resources.refuses), -peer.resources.gflops

    return [peer.id for peer in sorted(able, key=place)]


async def _index(
    services: JobServices, log: JobLog, workload: Workload
) -> tuple[Mapping[str, TensorEntry], Mapping[str, TensorEntry]]:
    """Digests of the tensors that any stage needs, and of the adapter's."""
    whole = Wanted(stage_parts(0, workload.spec.layers, embedding=True, head=True))
    emit_progress(log, "distribute", 0, 1, "reading the model")
    tensors = await _tensors(services, log, workload, whole)
    names = whole.adapter_names(workload.spec, workload.lora)
    names = tuple(name for name in names if name in workload.adapter)
    return tensors, await _entries(services, workload.adapter, names)


async def _tensors(
    services: JobServices, log: JobLog, workload: Workload, whole: Wanted
) -> Mapping[str, TensorEntry]:
    """The checkpoint's tensors, and in the place of matrices what they are quantised to."""
    model, spec = workload.model, workload.spec
    if workload.quantise == "none":
        stored = {head_sources(spec)[-1].name: model.tensors[head_sources(model.spec)[-1].name]}
        return await _entries(services, {**model.tensors, **stored}, whole.tensor_names(spec))
    entries = await _entries(services, model.tensors, whole.tensor_names(model.spec))

    def progress(name: str, done: int, of: int) -> None:
        emit_progress(log, "quantise", done, of, name)

    matrices = quantised_matrices(spec, tied=model.spec.tied)
    return entries | await services.quantiser.entries(matrices, entries, model.tensors, progress)


async def _entries(
    services: JobServices, locations: Mapping[str, TensorLocation], names: tuple[str, ...]
) -> dict[str, TensorEntry]:
    entries = await asyncio.to_thread(services.index.entries, locations, names)
    return {entry.name: entry for entry in entries}
