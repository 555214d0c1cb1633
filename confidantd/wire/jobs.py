"""Requests between owner, coordinator, compiler and the devices that hold stages.

| method | from | to | carries |
|---|---|---|---|
| `job.plan` | owner | coordinator | `PlanRequest` -> plan, nothing reserved |
| `job.negotiate` | owner | coordinator | `PlanRequest` -> plan that every device accepted |
| `stage.offer` | coordinator | device | `Offer` -> `OfferAnswer` |
| `stage.backends` | coordinator | device | `BackendsQuestion` -> `BackendsAnswer` |
| `device.speeds` | coordinator | device | `SpeedsQuestion` -> `KnownSpeeds` |
| `device.measure` | owner | device | `Measure` -> `SpeedsAnswer` |
| `device.link` | owner | device | `MeasureLink` -> `LinkAnswer` |
| `stage.withdraw` | coordinator | device | `StopStage`: the final plan does not use the offer |
| `stage.start` | owner | device | `StageAssignment` -> `StageStarted` |
| `stage.command` | owner | device | `StageCommand` |
| `stage.event` (notify) | device | owner | `StageEvent` |
| `stage.progress` (notify) | device | owner | `StageProgress` |
| `stage.spares` | owner | device | `Spares` |
| `job.running` (notify) | owner | member it meets again | `RunningJobs` |
| `stage.pulse` (notify) | owner | device | `Pulse` |
| `stage.stop` | owner | device | `StopStage` |
| `programs.compile` | owner | compiler | `ProgramRequest` -> `Compiled` |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from confidantd.ids import DeviceId, JobId
from confidantd.models.spec import Form, LoraSpec, Method, ModelSpec, ProgramRequest
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import BackendShare, ProgramEntry, TensorEntry

Objective = Literal["train", "generate", "serve"]
OwnerEnds = Literal["auto", "always", "never"]
MAX_SHAPES = 32  # in one question about speeds; a batch has fewer cuts that are compared


@dataclass(frozen=True, slots=True)
class CurrentStage:
    """What a device holds of a job that runs, in the order of its stages."""

    device: DeviceId
    layers: int
    form: Form
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """What a job has measured of the link between two devices; it counts instead of what else
    is known.
    """

    source: DeviceId
    target: DeviceId
    mbps: float


@dataclass(frozen=True, slots=True)
class MeasureLink:
    """Measure the link to `target` now."""

    target: DeviceId


@dataclass(frozen=True, slots=True)
class LinkAnswer:
    """Its bandwidth; None if it cannot be measured now."""

    mbps: float | None


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan depends on. `devices` are names or ids that must all be used; empty: any.

    `sequence_length` is the training length, or prompt plus new tokens for generation.
    `microbatches` 0: the planner's choice. `load`: requests at once that are served.
    `layers`: how many each of `devices` gets, in order; empty: the planner's choice.
    `owner_ends`: whether the owner holds both embedding and head: `auto`, if it costs little.
    `explain`: the plan shall say what its choices cost.
    `current` are the stages of a job that runs already: their memory is the job's to use.
    `without` are devices that cannot hold a stage of this job, with the reason.
    """

    job: JobId
    epoch: int
    model_name: str
    model: ModelSpec
    objective: Objective
    method: Method | None
    lora: LoraSpec | None
    batch_size: int
    microbatches: int
    sequence_length: int
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    owner_ends: OwnerEnds = "auto"
    current: tuple[CurrentStage, ...] = ()
    without: dict[DeviceId, str] = field(default_factory=dict)
    links: tuple[LinkSeen, ...] = ()
    load: int = 0
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """One device's part of a plan: layers [first_layer, past_last_layer) and their memory.

    `goes_on`: the stage that the device holds of the job's last epoch and that is to go on as
    this one. Offers of a later `round` of a negotiation replace those of earlier ones.
    """

    job: JobId
    epoch: int
    term: int
    owner: DeviceId
    stage: int
    stages: int
    first_layer: int
    past_last_layer: int
    memory_bytes: int
    goes_on: int | None = None
    round: int = 0


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """Accepted, or declined with what the device has and why.

    `refuses`: it takes no part at all now, however little memory it takes.
    """

    accepted: bool
    available_bytes: int
    reason: str = ""
    refuses: bool = False


@dataclass(frozen=True, slots=True)
class BackendsQuestion:
    """How a device would share out blocks of these programs' shape."""

    programs: ProgramRequest
    form: Form


@dataclass(frozen=True, slots=True)
class BackendsAnswer:
    """Who would compute what, from what was measured before; empty if nothing was.

    `seconds` are predicted for one block, forward and backward.
    """

    shares: tuple[BackendShare, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeedsQuestion:
    """How fast a device is with blocks of each of these programs' shapes."""

    requests: tuple[ProgramRequest, ...]


@dataclass(frozen=True, slots=True)
class KnownSpeeds:
    """What is known of each shape that was asked for, in order; None where nothing is.

    `available_bytes` are those for jobs at this moment: what was gossiped is some seconds old.
    """

    speeds: tuple[Speeds | None, ...]
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure that, with these programs, which `source` serves."""

    request: ProgramRequest
    programs: dict[str, ProgramEntry]
    source: DeviceId


@dataclass(frozen=True, slots=True)
class SpeedsAnswer:
    """What was measured; None if that failed, with the reason."""

    speeds: Speeds | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StageStarted:
    """The worker has loaded its stage and listens on `port` for the other stages."""

    port: int
    resident_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class StageCommand:
    """A command (`wire.worker.message_map`) for the worker of one stage."""

    job: JobId
    epoch: int
    stage: int
    command: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageEvent:
    """An event (`wire.worker.message_map`) of the worker of one stage."""

    job: JobId
    epoch: int
    stage: int
    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far a device is in fetching or loading its stage."""

    job: JobId
    epoch: int
    stage: int
    phase: Literal["distribute", "load"]
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class StopStage:
    """End the worker of a job on this device and free what was granted."""

    job: JobId
    epoch: int


@dataclass(frozen=True, slots=True)
class Spares:
    """Weights that `source` serves and that this device may need when others are lost."""

    job: JobId
    source: DeviceId
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class Pulse:
    """The owner is there; that it arrived, the device's kernel tells."""

    job: JobId


@dataclass(frozen=True, slots=True)
class RunningJobs:
    """The oldest epoch of each job of the sender that is not over; stages of others are."""

    epochs: dict[JobId, int]


@dataclass(frozen=True, slots=True)
class Compiled:
    """The programs of a request; the answering device serves them as blobs."""

    programs: dict[str, ProgramEntry]
