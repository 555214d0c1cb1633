"""A plan: which device holds which layers, what that costs, and who was left out and why."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from confidantd.errors import DeviceError, DoesNotFitError
from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice, link_cost, stage_cost
from confidantd.planner.ends import MOST_COST, both_ends
from confidantd.planner.explain import Alternative, Explanation, Recomputing, explain
from confidantd.planner.memory import stage_memory
from confidantd.planner.microbatches import Cut, OtherCount, best_cut
from confidantd.planner.partition import Partition, alternatives, best_partition
from confidantd.planner.score import best_simulated, simulated_seconds
from confidantd.planner.shortfall import does_not_fit
from confidantd.planner.simulate import LinkCost
from confidantd.planner.workload import Form, Workload
from confidantd.wire.jobs import OwnerEnds
from confidantd.wire.stage import BackendShare

MEGABYTE = 1_000_000


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
    message_seconds: float = 0.0  # of its forward and again of its backward: to pass them on
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
class Plan:
    """The whole plan; `seconds` is predicted for a step (training), or for one token of each of
    `requests` (generation).

    `microbatches` is 1 in generation, of `microbatch_size` sequences of `sequence_length`
    tokens. `kept_seconds`: what the stages of now would take, where a job runs already.
    """

    model: str
    objective: str
    stages: tuple[StagePlan, ...]
    links: tuple[LinkPlan, ...]
    left_out: tuple[LeftOut, ...]
    seconds: float
    tokens_per_second: float
    microbatches: int = 1
    microbatch_size: int = 1
    sequence_length: int = 0
    requests: int = 1
    explanation: Explanation = field(default_factory=Explanation)
    kept_seconds: float | None = None
    standstill_seconds: float = 0.0  # until it could replace them

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
            "microbatch_size": self.microbatch_size,
            "sequence_length": self.sequence_length,
            "load": self.requests,
            **_explanation_json(self.explanation),
            "left_out": [
                {"device": d.device, "name": d.name, "reason": d.reason} for d in self.left_out
            ],
            "predicted": {
                "step_seconds": self.seconds,
                "tokens_per_second": self.tokens_per_second,
            },
        }


def choose_plan(
    cuts: Sequence[Cut],
    owner: DeviceId,
    *,
    count: int = 0,
    use_all: bool = False,
    layers: tuple[int, ...] = (),
    ends: OwnerEnds = "never",
    explained: bool = False,
) -> Plan:
    """The fastest plan that fits; `DoesNotFitError` names each device's shortfall.

    `cuts` have the same devices. With a `count` the batch is cut into so many microbatches, and
    the other ones are only for comparison. With `layers` each device gets as many, in their
    order. `ends`: whether the owner holds both ends of the model; `auto` if that costs
    little. With `explained` it says what its choices cost, which takes longer.
    """
    work, devices = cuts[0].work, cuts[0].devices
    if use_all and len(devices) > work.layers:
        raise DeviceError(
            f"{len(devices)} devices cannot share {work.layers} layers", "name fewer devices"
        )
    possible = [cut for cut in cuts if count in (0, cut.work.microbatches)]
    best = best_cut(possible, owner, use_all=use_all, layers=layers)
    if best is None:
        least = max(possible, key=lambda cut: cut.work.microbatches)
        raise does_not_fit(least.work, devices, owner, use_all=use_all)
    chosen, found = best
    rivals = _rivals(chosen, found, owner, use_all=use_all, layers=layers, explained=explained)
    if not use_all and not layers:
        found, rivals = best_simulated(chosen.work, found, rivals, owner)
    if not layers:
        straight = found
        found = _with_ends(chosen.work, chosen.devices, owner, straight, ends, use_all=use_all)
        rivals = [straight, *rivals] if found is not straight else rivals
    stages = _stages(chosen.work, found)
    running = replace(found, forms=tuple(stage.form for stage in stages))
    plan = _plan(chosen, running, stages)
    if not explained:
        return plan
    providers = [len(stage.unmeasured) for stage in stages]
    said = explain(
        chosen, running, providers, owner, cuts, rivals,
        insists=use_all or bool(layers), layers=layers,
    )  # fmt: skip
    return replace(plan, explanation=said)


def _rivals(
    chosen: Cut,
    found: Partition,
    owner: DeviceId,
    *,
    use_all: bool,
    layers: Sequence[int],
    explained: bool,
) -> list[Partition]:
    """Partitions that are compared with the one that was found: to choose, or only to show."""
    if layers or (use_all and not explained):
        return []
    return alternatives(chosen.work, chosen.devices, owner, found, however_slow=explained)


def _plan(chosen: Cut, found: Partition, stages: tuple[StagePlan, ...]) -> Plan:
    work = chosen.work
    seconds = simulated_seconds(work, found)
    tokens = work.tokens * work.microbatches if work.method else work.requests
    return Plan(
        model=work.model,
        objective="train" if work.method else "serve" if work.load else "generate",
        stages=stages,
        links=_links(work, found),
        left_out=_left_out(work, chosen.devices, found, seconds),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        microbatches=work.microbatches if work.method else 1,
        microbatch_size=work.microbatch_size if work.method else 1,
        sequence_length=work.sequence_length,
        requests=work.requests,
    )


def seconds_of(
    work: Workload, devices: Sequence[PlanDevice], layers: Sequence[int], forms: Sequence[Form]
) -> float:
    """Of a step (or a token) with these stages."""
    return simulated_seconds(work, Partition(tuple(devices), tuple(layers), tuple(forms), 0.0))


def _with_ends(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    best: Partition,
    ends: OwnerEnds,
    *,
    use_all: bool,
) -> Partition:
    """The best partition, or the one in which the owner keeps both ends.

    Two stages on one device run on its CPU only: an owner with more than that is only asked
    to if the user insists.
    """
    if ends == "never" or work.method is None:
        return best
    here = next((device for device in devices if device.id == owner), None)
    if ends == "always":
        return _ends_here(work, devices, here, best, use_all=use_all)
    if len(best.devices) == 1 or here is None or (work.splits and len(here.backends) > 1):
        return best
    ring = both_ends(work, devices, owner, best, use_all=use_all)
    limit = (1 + MOST_COST) * simulated_seconds(work, best)
    return best if ring is None or ring.seconds > limit else ring


def _ends_here(
    work: Workload,
    devices: Sequence[PlanDevice],
    here: PlanDevice | None,
    best: Partition,
    *,
    use_all: bool,
) -> Partition:
    """The fastest of what a user who insists on both ends here may get: a ring, or this alone."""
    if here is None:
        raise DeviceError(
            "this device takes no part, and --owner-ends always keeps both ends on it",
            "name it in --devices, or leave --owner-ends away",
        )
    found = both_ends(work, devices, here.id, best, use_all=use_all)
    rings = [] if found is None else [found]
    if not use_all or len(devices) == 1:
        alone = best_partition(work, [here], here.id, use_all=True)
        rings += [] if alone is None else [alone]
    if not rings:
        raise DoesNotFitError(
            "both ends of the model do not fit on this device beside the others",
            "free memory here, or leave --owner-ends away",
        )
    return min(rings, key=lambda one: simulated_seconds(work, one))


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
        message_seconds=cost.messages,
        measured=device.speeds is not None,
    )


def _ways(others: int) -> tuple[tuple[Form, int], ...]:
    """Forms with so many further backends, the fastest first: two backends gain more than what
    the saved form does not compute again.
    """
    alone: tuple[tuple[Form, int], ...] = (("saved", 0), ("recompute", 0))
    return (("saved", others), ("recompute", others), *alone) if others else alone


def _links(work: Workload, found: Partition) -> tuple[LinkPlan, ...]:
    ways = 2 * work.microbatches if work.method else work.requests
    return tuple(
        LinkPlan(a.id, b.id, ways * work.activation_bytes, k.seconds + k.latency, k.seconds)
        for a, b in itertools.pairwise(found.devices)
        for k in [link_cost(work, a, b)]
    )


def _left_out(
    work: Workload, devices: Sequence[PlanDevice], found: Partition, seconds: float
) -> tuple[LeftOut, ...]:
    """Why each unused device is not used: too little memory, or it would not help."""
    used = {device.id for device in found.devices}
    return tuple(
        LeftOut(d.id, d.name, _reason(work, d, seconds)) for d in devices if d.id not in used
    )


def _reason(work: Workload, device: PlanDevice, seconds: float) -> str:
    least = stage_memory(work, 1, embedding=False, head=False, stage=1, stages=3).total
    if device.available_bytes < least:
        short = (least - device.available_bytes) / MEGABYTE
        return f"one layer needs {short:.0f} MB more memory than it has"
    if work.load:
        return "with it there would be fewer tokens a second"
    verb = "step" if work.method else "token"
    return f"with it a {verb} would take longer than {seconds:.3g} s"


def _explanation_json(said: Explanation) -> dict[str, Any]:
    return {
        "alternatives": [_plain(other) for other in said.alternatives],
        "faster": None if said.faster is None else _plain(said.faster),
        "recomputing": [_plain(stage) for stage in said.recomputing],
        "other_microbatches": [_plain(other) for other in said.other_counts],
    }


def _plain(fact: Alternative | Recomputing | OtherCount) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(fact).items()}


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
        "message_seconds": stage.message_seconds,
        "measured": stage.measured,
        "form": stage.form,
        "backends": [
            {"name": share.name, "heads": share.heads, "columns": share.columns}
            for share in stage.backends or (BackendShare("cpu", stage.heads, stage.columns),)
        ],
        "unmeasured_backends": list(stage.unmeasured),
        "cpu_only": stage.cpu_only,
    }
