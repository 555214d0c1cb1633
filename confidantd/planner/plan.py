"""A plan: which device holds which layers, what that costs, and who was left out and why."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from confidantd.errors import DeviceError, DoesNotFitError
from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice, link_cost, stage_cost
from confidantd.planner.ends import MOST_COST, both_ends, ring_seconds
from confidantd.planner.memory import stage_memory
from confidantd.planner.partition import (
    Partition,
    alternatives,
    best_partition,
    fixed_partition,
    predicted_seconds,
)
from confidantd.planner.simulate import LinkCost
from confidantd.planner.workload import Form, Workload
from confidantd.wire.stage import BackendShare

MEGABYTE = 1_000_000
Ends = Literal["auto", "always", "never"]
MOST_ALTERNATIVES = 2
LORA_GUESS = 64  # adapter weights per unit of width: rank 8 on four square projections


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: layers [first_layer, past_last_layer) on a device; seconds per microbatch.

    `form`: its forwards keep what the backward needs (`saved`), or that is computed again.
    `backends` share its blocks (empty: the CPU has them whole); `unmeasured` are further
    ones, which are measured when the first job with blocks of this shape runs. `cpu_only`:
    there is no memory for them.
    """

    device: DeviceId
    name: str
    first_layer: int
    past_last_layer: int
    embedding: bool
    head: bool
    memory_bytes: int
    available_bytes: int
    seconds: float
    heads: int
    columns: int
    form: Form = "saved"
    backends: tuple[BackendShare, ...] = ()
    unmeasured: tuple[str, ...] = ()
    cpu_only: bool = False
    forward_seconds: float = 0.0  # of a microbatch; the rest of `seconds` is its backward
    update_seconds: float = 0.0  # of the optimizer, once a step
    measured: bool = False  # on blocks of this shape, on this device


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """What one step (or token) sends over a link, both ways, and the seconds of one microbatch:
    until it has arrived, of which it occupies the link for `sending_seconds`.
    """

    source: DeviceId
    target: DeviceId
    bytes: int
    seconds: float
    sending_seconds: float = 0.0

    @property
    def cost(self) -> LinkCost:
        """As the simulator takes it."""
        return LinkCost(self.sending_seconds, self.seconds - self.sending_seconds)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A device that the plan does not use."""

    device: DeviceId
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan that would do: names of its devices in order, their layers, its seconds."""

    devices: tuple[str, ...]
    layers: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole plan; `seconds` is predicted for a step (training) or a token (generation).

    `microbatches` is 1 in generation. `kept_seconds`: what the stages of now would take, where
    a job runs already.
    """

    model: str
    objective: str
    stages: tuple[StagePlan, ...]
    links: tuple[LinkPlan, ...]
    left_out: tuple[LeftOut, ...]
    seconds: float
    tokens_per_second: float
    microbatches: int = 1
    alternatives: tuple[Alternative, ...] = ()
    kept_seconds: float | None = None
    standstill_seconds: float = 0.0  # until it could replace them

    def holders(self) -> list[int]:
        """For each stage the first one on its device."""
        devices = [stage.device for stage in self.stages]
        return [devices.index(device) for device in devices]

    def to_json(self) -> dict[str, Any]:
        """The object of the command-line contract."""
        return {
            "model": self.model,
            "objective": self.objective,
            "stages": [_stage_json(stage) for stage in self.stages],
            "links": [
                {
                    "from": k.source,
                    "to": k.target,
                    "bytes": k.bytes,
                    "seconds": k.seconds,
                    "sending_seconds": k.sending_seconds,
                }
                for k in self.links
            ],
            "microbatches": self.microbatches,
            "alternatives": [
                {"devices": list(a.devices), "layers": list(a.layers), "seconds": a.seconds}
                for a in self.alternatives
            ],
            "left_out": [
                {"device": d.device, "name": d.name, "reason": d.reason} for d in self.left_out
            ],
            "predicted": {
                "step_seconds": self.seconds,
                "tokens_per_second": self.tokens_per_second,
            },
        }


def make_plan(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    *,
    use_all: bool = False,
    layers: tuple[int, ...] = (),
    ends: Ends = "never",
    explain: bool = False,
) -> Plan:
    """The fastest plan that fits; `DoesNotFitError` names each device's shortfall.

    With `layers` each of `devices` gets as many, in their order. `ends`: whether the owner
    holds both ends of the model; `auto` if that costs little. With `explain` it comes with
    the next-best ones, which takes longer.
    """
    if use_all and len(devices) > work.layers:
        raise DeviceError(
            f"{len(devices)} devices cannot share {work.layers} layers", "name fewer devices"
        )
    if layers:
        found = fixed_partition(work, devices, layers)
    else:
        found = best_partition(work, devices, owner, use_all=use_all)
    if found is not None and not layers:
        found = _with_ends(work, devices, owner, found, ends, use_all=use_all)
    if found is None:
        raise _does_not_fit(work, devices, use_all=use_all)
    tokens = work.tokens * work.microbatches if work.method else 1
    stages = _stages(work, found)
    seconds = _seconds(work, found, [stage.form for stage in stages])
    return Plan(
        model=work.model,
        objective="train" if work.method else "generate",
        stages=stages,
        links=_links(work, found),
        left_out=_left_out(work, devices, found),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        microbatches=work.microbatches if work.method else 1,
        alternatives=_alternatives(work, devices, owner, found) if explain and not layers else (),
    )


def seconds_of(
    work: Workload, devices: Sequence[PlanDevice], layers: Sequence[int], forms: Sequence[Form]
) -> float:
    """Of a step (or a token) with these stages."""
    found = Partition(tuple(devices), tuple(layers), tuple(forms), 0.0)
    return _seconds(work, found, forms)


def _with_ends(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    best: Partition,
    ends: Ends,
    *,
    use_all: bool,
) -> Partition:
    """The best partition, or the one in which the owner keeps both ends.

    Two stages on one device run on its CPU only: an owner with more than that is only asked
    to if the user insists.
    """
    here = next((device for device in devices if device.id == owner), None)
    if ends == "never" or len(best.devices) == 1 or here is None:
        return best
    if ends == "auto" and work.splits and len(here.backends) > 1:
        return best
    ring = both_ends(work, devices, owner, best)
    if ring is None or (use_all and len(ring.devices) <= len(devices)):
        if ends == "always" and work.method is not None:
            raise DoesNotFitError(
                "both ends of the model do not fit on this device beside the others",
                "train without --owner-ends always",
            )
        return best
    straight = _seconds(work, best, best.forms)
    return ring if ends == "always" or ring.seconds <= (1 + MOST_COST) * straight else best


def _alternatives(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, found: Partition
) -> tuple[Alternative, ...]:
    others = alternatives(work, devices, owner, found)[:MOST_ALTERNATIVES]
    return tuple(
        Alternative(
            tuple(device.name for device in other.devices),
            other.layers,
            _seconds(work, other, other.forms),
        )
        for other in others
    )


def _seconds(work: Workload, found: Partition, forms: Sequence[Form]) -> float:
    """Of a step as simulated, or of a token."""
    if work.method is None:
        return predicted_seconds(work, found.devices, found.layers)
    return ring_seconds(work, found.devices, found.layers, forms)


def _stages(work: Workload, found: Partition) -> tuple[StagePlan, ...]:
    starts = [0, *itertools.accumulate(found.layers)]
    stages: list[StagePlan] = []
    for index, first in enumerate(starts[:-1]):
        device = found.devices[index].id
        taken = sum(stage.memory_bytes for stage in stages if stage.device == device)
        stages.append(_stage(work, found, index, first, taken))
    return tuple(stages)


def _stage(work: Workload, found: Partition, index: int, first: int, taken: int) -> StagePlan:
    """The fastest of `_ways` that fits beside the `taken` memory of another stage there; the
    last one does, or there would be no partition. A device with two stages is planned so.
    """
    device, layers, stages = found.devices[index], found.layers[index], len(found.devices)
    embedding, head = index == 0, index == stages - 1
    twice = sum(d.id == device.id for d in found.devices) > 1
    others = device.backends[1:] if work.splits and not twice else ()
    room = device.available_bytes - taken
    ways = ((found.forms[index], 0),) if twice else _ways(len(others))
    for form, providers in ways:
        memory = stage_memory(
            work, layers, embedding=embedding, head=head, stage=index, stages=stages, form=form,
            providers=providers,
        ).total  # fmt: skip
        if memory <= room:
            break
    cost = stage_cost(work, device, layers, head=head, embedding=embedding, form=form)
    return StagePlan(
        device=device.id,
        name=device.name,
        first_layer=first,
        past_last_layer=first + layers,
        embedding=embedding,
        head=head,
        memory_bytes=memory,
        available_bytes=room,
        seconds=cost.forward + cost.backward,
        heads=work.heads,
        columns=work.columns,
        form=form,
        unmeasured=others if providers else (),
        cpu_only=bool(others) and not providers,
        forward_seconds=cost.forward,
        update_seconds=cost.update,
        measured=device.speeds is not None,
    )


def _ways(others: int) -> tuple[tuple[Form, int], ...]:
    """Forms with so many further backends, the fastest first: two backends gain more than what
    the saved form does not compute again.
    """
    alone: tuple[tuple[Form, int], ...] = (("saved", 0), ("recompute", 0))
    return (("saved", others), ("recompute", others), *alone) if others else alone


def _links(work: Workload, found: Partition) -> tuple[LinkPlan, ...]:
    ways = 2 * work.microbatches if work.method else 1
    return tuple(
        LinkPlan(a.id, b.id, ways * work.activation_bytes, k.seconds + k.latency, k.seconds)
        for a, b in itertools.pairwise(found.devices)
        for k in [link_cost(work, a, b)]
    )


def _left_out(
    work: Workload, devices: Sequence[PlanDevice], found: Partition
) -> tuple[LeftOut, ...]:
    """Why each unused device is not used: too little memory, or it would not help."""
    used = {device.id for device in found.devices}
    return tuple(
        LeftOut(d.id, d.name, _reason(work, d, found)) for d in devices if d.id not in used
    )


def _reason(work: Workload, device: PlanDevice, found: Partition) -> str:
    least = stage_memory(work, 1, embedding=False, head=False, stage=1, stages=3).total
    if device.available_bytes < least:
        short = (least - device.available_bytes) / MEGABYTE
        return f"one layer needs {short:.0f} MB more memory than it has"
    verb = "step" if work.method else "token"
    return f"with it a {verb} would take longer than {found.seconds:.3g} s"


def _does_not_fit(
    work: Workload, devices: Sequence[PlanDevice], *, use_all: bool
) -> DoesNotFitError:
    """Each device's memory against an equal share of the model, and what would help."""
    count = min(len(devices), work.layers)
    share = -(-work.layers // count)
    shortfalls = []
    for index, device in enumerate(devices):
        stage = min(index, count - 1)
        need = stage_memory(
            work, share, embedding=stage == 0, head=stage == count - 1, stage=stage, stages=count
        ).total
        short = need - device.available_bytes
        state = f"is {short / MEGABYTE:.0f} MB short of" if short > 0 else "has"
        shortfalls.append(f"{device.name} {state} the {need / MEGABYTE:.0f} MB for its share")
    verb = "training" if work.method else "running"
    return DoesNotFitError(
        f"{verb} {work.model} does not fit: {'; '.join(shortfalls)}",
        _what_would_fit(work, devices, use_all=use_all),
    )


def _what_would_fit(work: Workload, devices: Sequence[PlanDevice], *, use_all: bool) -> str:
    """The changes that were tried and fit these devices; without any, more memory is needed."""

    def fits(changed: Workload, *, all_of_them: bool = use_all) -> bool:
        return best_partition(changed, devices, devices[0].id, use_all=all_of_them) is not None

    found = []
    if use_all and len(devices) > 1 and fits(work, all_of_them=False):
        found.append("fewer --devices")
    one_row = replace(
        work, microbatch_size=1, microbatches=work.microbatches * work.microbatch_size
    )
    if work.method is not None and work.microbatch_size > 1 and fits(one_row):
        found.append(f"--microbatches {one_row.microbatches}")
    lora = replace(work, method="lora", block_adapter=LORA_GUESS * work.hidden)
    if work.method == "full" and fits(lora):
        found.append("--method lora")
    if found:
        return "it fits with " + " or ".join(found)
    if work.method is None:
        return "pair another device, or free memory on these"
    return "pair another device, free memory on these, or lower --sequence-length"


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return {
        "device": stage.device,
        "name": stage.name,
        "layers": [stage.first_layer, stage.past_last_layer],
        "embedding": stage.embedding,
        "head": stage.head,
        "memory_bytes": stage.memory_bytes,
        "available_bytes": stage.available_bytes,
        "seconds": stage.seconds,
        "forward_seconds": stage.forward_seconds,
        "update_seconds": stage.update_seconds,
        "measured": stage.measured,
        "form": stage.form,
        "backends": [
            {"name": share.name, "heads": share.heads, "columns": share.columns}
            for share in stage.backends or (BackendShare("cpu", stage.heads, stage.columns),)
        ],
        "unmeasured_backends": list(stage.unmeasured),
        "cpu_only": stage.cpu_only,
    }
