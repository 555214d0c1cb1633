"""From what the swarm reports to what the planner reads."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from confidantd.errors import DeviceError, UsageError
from confidantd.ids import DeviceId, short_id
from confidantd.models.layout import cached_width
from confidantd.models.programs import worth_splitting
from confidantd.models.quantisation import block_bytes, embedding_bytes, head_bytes
from confidantd.models.saved import saved_floats
from confidantd.models.spec import ProgramRequest
from confidantd.models.tensors import (
    block_parameters,
    embedding_parameters,
    head_parameters,
    lora_parameters,
)
from confidantd.planner.costs import PlanDevice, assumed_speeds
from confidantd.planner.microbatches import Cut, counts
from confidantd.planner.plan import LeftOut, Plan, seconds_of
from confidantd.planner.speeds import resized, valid
from confidantd.planner.workload import Workload
from confidantd.swarm.state import PeerView
from confidantd.wire.jobs import CurrentStage, PlanRequest
from confidantd.wire.links import Link, plausible
from confidantd.wire.messages import clean_text
from confidantd.wire.resources import MAX_REASON_CHARACTERS
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageAssignment


def plan_devices(
    peers: Sequence[PeerView], wanted: tuple[str, ...], exempt: Collection[DeviceId]
) -> list[PlanDevice]:
    """The devices that may hold a stage: those named, or all that are alive and take work.

    Of `exempt` ones nobody asks whether they take work. `DeviceError` names the first wanted
    device that is unknown, not there, or takes none.
    """
    if not wanted:
        return [_device(peer) for peer in _alive(peers) if not _refuses(peer, exempt)]
    return [_device(_find(name, peers, exempt)) for name in dict.fromkeys(wanted)]


def exempt_from_policy(request: PlanRequest, owner: DeviceId) -> set[DeviceId]:
    """Devices whose policy does not count for a job: it is about new work for others. Whoever
    starts a job on a device wants it there, and a stage that runs is not new.
    """
    return {owner, *(stage.device for stage in request.current)}


def refusing(
    peers: Sequence[PeerView], wanted: tuple[str, ...], exempt: Collection[DeviceId]
) -> tuple[LeftOut, ...]:
    """The devices that `plan_devices` leaves out of an open choice, and why."""
    if wanted:
        return ()
    found = [(peer, _refuses(peer, exempt)) for peer in _alive(peers)]
    return tuple(LeftOut(peer.id, peer.name, reason) for peer, reason in found if reason)


def takes_no_part(name: str, reason: str) -> DeviceError:
    """The error about a device that was asked for by name."""
    return DeviceError(
        f"{name[:64]} takes no part now: {reason}",
        "see `confidant doctor` there, or leave it out of --devices",
    )


def with_current(device: PlanDevice, request: PlanRequest) -> PlanDevice:
    """The device with the memory that the job holds there already, and the links it measured."""
    held = sum(stage.memory_bytes for stage in request.current if stage.device == device.id)
    links = dict(device.links)
    for seen in request.links:
        ends = (seen.source, seen.target)
        if device.id in ends and plausible(Link(mbps=seen.mbps)):
            other = ends[1 - ends.index(device.id)]
            links[other] = replace(links.get(other, Link()), mbps=seen.mbps)
    return replace(device, available_bytes=device.available_bytes + held, links=links)


def cannot(request: PlanRequest, peers: Sequence[PeerView]) -> tuple[LeftOut, ...]:
    """The devices that the request leaves out, with its reasons."""
    names = {peer.id: peer.name for peer in peers}
    return tuple(
        LeftOut(device, names.get(device, short_id(device)), reason)
        for device, reason in request.without.items()
    )


def kept_seconds(
    work: Workload, devices: Sequence[PlanDevice], current: Sequence[CurrentStage]
) -> float | None:
    """What a step would take if a running job stayed as it is; None if it cannot."""
    by_id = {device.id: device for device in devices}
    if not current or any(stage.device not in by_id for stage in current):
        return None
    return seconds_of(
        work,
        [by_id[stage.device] for stage in current],
        [stage.layers for stage in current],
        [stage.form for stage in current],
    )


def kept_layers(current: Sequence[CurrentStage], plan: Plan) -> dict[DeviceId, tuple[int, int]]:
    """Of each device of a plan: how many of its layers it has already, and how many they are."""
    starts = itertools.accumulate((stage.layers for stage in current), initial=0)
    there, wanted = defaultdict[DeviceId, set[int]](set), defaultdict[DeviceId, set[int]](set)
    for stage, first in zip(current, starts, strict=False):
        there[stage.device] |= set(range(first, first + stage.layers))
    for planned in plan.stages:
        wanted[planned.device] |= set(range(planned.first_layer, planned.past_last_layer))
    return {d: (len(layers & there[d]), len(layers)) for d, layers in wanted.items()}


def cut_requests(request: PlanRequest) -> tuple[PlanRequest, ...]:
    """One request for each number of microbatches that is compared: the one that was asked for,
    and those that the planner may choose from.
    """
    if request.method is None:
        return (request,)
    given = request.microbatches
    batch = request.batch_size
    if batch < 1 or given < 0 or (given and batch % given):
        raise UsageError(f"a batch of {batch} cannot be cut into {given} microbatches")
    numbers = {*counts(batch), given} - {0}
    return tuple(replace(request, microbatches=number) for number in sorted(numbers))


def cuts_of(
    requests: Sequence[PlanRequest],
    devices: Sequence[PlanDevice],
    speeds: Mapping[DeviceId, Sequence[Speeds | None]],
) -> tuple[Cut, ...]:
    """Ways to cut the batch, one a request, with what each device knows of its speed at them.

    What a device does not know of one size follows from what it knows of the nearest one.
    """
    works = [plan_workload(request) for request in requests]
    found = []
    for index, work in enumerate(works):
        known = {device.id: speeds.get(device.id, ()) for device in devices}
        found.append(
            Cut(
                work,
                tuple(replace(d, speeds=_speeds_at(works, index, known[d.id])) for d in devices),
            )
        )
    return tuple(found)


def _speeds_at(
    works: Sequence[Workload], index: int, known: Sequence[Speeds | None]
) -> Speeds | None:
    there = [(i, speeds) for i, speeds in enumerate(known) if speeds is not None and valid(speeds)]
    if not there:
        return None
    near, speeds = min(there, key=lambda one: abs(one[0] - index))
    if near == index:
        return speeds
    before, after = (assumed_speeds(works[i], 1.0) for i in (near, index))
    return resized(speeds, before, after)


def plan_workload(request: PlanRequest) -> Workload:
    """Sizes of the model and the step."""
    model, block = request.model, request.model.block
    return Workload(
        model=request.model_name,
        layers=model.layers,
        block_parameters=block_parameters(model),
        block_adapter=lora_parameters(model, request.lora) if request.lora else 0,
        embedding_parameters=embedding_parameters(model),
        head_parameters=head_parameters(model),
        tied=model.tied,
        hidden=block.hidden,
        vocabulary=model.vocabulary,
        heads=block.heads,
        head_dim=block.head_dim,
        kv_width=block.kv_heads * cached_width(block),
        columns=block.columns,
        microbatch_size=request.batch_size // request.microbatches,
        microbatches=request.microbatches,
        sequence_length=request.sequence_length,
        method=request.method,
        saved_floats=0 if request.method is None else _saved_floats(request),
        splits=not model.quantised and worth_splitting(program_request(request)),
        load=request.load,
        block_bytes=block_bytes(model) if model.quantised else 0,
        embedding_bytes=embedding_bytes(model) if model.quantised else 0,
        head_bytes=head_bytes(model) if model.quantised else 0,
    )


def assignment_workload(place: StageAssignment) -> Workload:
    """Sizes of the job that a stage belongs to."""
    spec = place.spec
    return plan_workload(
        PlanRequest(
            job=place.job,
            epoch=place.epoch,
            model_name="",
            model=spec.model,
            objective="train" if spec.training else "generate",
            method=spec.training,
            lora=spec.lora,
            batch_size=spec.microbatch_size * place.microbatches,
            microbatches=place.microbatches,
            sequence_length=spec.sequence_length,
        )
    )


def program_request(request: PlanRequest) -> ProgramRequest:
    """The programs that a plan's stages run."""
    rows = request.batch_size // request.microbatches
    return ProgramRequest.of(
        request.model, request.method, request.lora, rows, request.sequence_length
    )


def _saved_floats(request: PlanRequest) -> int:
    rows = request.batch_size // request.microbatches
    return saved_floats(request.model, request.lora, rows, request.sequence_length)


def _alive(peers: Sequence[PeerView]) -> list[PeerView]:
    """Those that are there and have said what they have."""
    alive = [peer for peer in peers if peer.is_self or peer.state == "alive"]
    return [peer for peer in alive if peer.resources is not None]


def _refuses(peer: PeerView, exempt: Collection[DeviceId]) -> str:
    """Why a device takes no work; empty if it does."""
    if peer.resources is None or peer.id in exempt:
        return ""
    return clean_text(peer.resources.refuses, MAX_REASON_CHARACTERS)


def _find(name: str, peers: Sequence[PeerView], exempt: Collection[DeviceId]) -> PeerView:
    for peer in peers:
        if name in (peer.name, peer.id, short_id(peer.id)) and peer.state != "unpaired":
            if not peer.is_self and peer.state != "alive":
                raise DeviceError(f"{name} is {peer.state}", "start confidantd there")
            if peer.resources is None:
                raise DeviceError(f"{name} has not said yet what it has", "try again in a second")
            if reason := _refuses(peer, exempt):
                raise takes_no_part(peer.name, reason)
            return peer
    raise DeviceError(f"there is no device {name[:64]} in the swarm", "see `confidant peers`")


def _device(peer: PeerView) -> PlanDevice:
    resources = peer.resources
    assert resources is not None
    trip = peer.round_trip_ms
    return PlanDevice(
        id=peer.id,
        name=peer.name,
        available_bytes=resources.available_bytes,
        gflops=resources.gflops,
        bandwidth_mbps=resources.bandwidth_mbps,
        round_trip_seconds=None if trip is None else trip / 1000,
        backends=resources.backends or ("cpu",),
        links=peer.links,
    )
