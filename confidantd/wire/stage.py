"""What a stage worker is told, and what it says back: shared by jobs, worker and engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from confidantd.ids import DeviceId, Digest, JobId
from confidantd.models.spec import Form, LoraSpec, Method, ModelSpec
from confidantd.models.stage_parts import Part, stage_parts


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: its name and dtype as in safetensors, and its content digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class ProgramEntry:
    """A compiled program as a blob."""

    digest: Digest
    bytes: int


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """AdamW as `torch.optim.AdamW` computes it; the learning rate comes with each step."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True, slots=True)
class BackendShare:
    """What one backend computes of each block: query heads, and MLP columns."""

    name: str
    heads: int
    columns: int


@dataclass(frozen=True, slots=True)
class StageSpec:
    """The part of a model that one stage computes, and how.

    `training` is None for generation; `form` says whether a training stage keeps what its
    forwards computed (`saved`) or computes it again (`recompute`). `lora` describes
    either the adapter that is trained (method `lora`) or one that is computed beside
    the weights (generation). `microbatch_size` and `sequence_length` are the training shapes.
    """

    model: ModelSpec
    first_layer: int
    past_last_layer: int
    embedding: bool
    head: bool
    training: Method | None
    lora: LoraSpec | None = None
    form: Form = "saved"
    microbatch_size: int = 1
    sequence_length: int = 1
    seed: int = 0
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)


def parts_of(spec: StageSpec) -> frozenset[Part]:
    """Layers and ends of a stage."""
    return stage_parts(
        spec.first_layer, spec.past_last_layer, embedding=spec.embedding, head=spec.head
    )


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A trained tensor by its name, with both its moments: [3, size] float32 in the program's
    layout, at `offset` in a blob of so many `bytes` that `source` serves.
    """

    name: str
    size: int
    bytes: int
    digest: Digest
    source: DeviceId
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StageAssignment:
    """Everything a device needs to run one stage of one job in one epoch.

    `programs` maps a program's name to its blob; `tensors` are the checkpoint's
    (and `adapter_tensors` the adapter's) that this stage needs. All are blobs that
    `source` (the owner) serves. `cpu_only`: the plan has no memory for further backends.
    A generating stage holds the keys and values of `rows` sequences at the most.
    In an epoch that begins after `steps_done` steps, `state` is what this device has to
    take over from others, or to go back to; what it had besides it keeps.
    """

    job: JobId
    epoch: int
    stage: int
    stages: int
    microbatches: int
    spec: StageSpec
    source: DeviceId
    programs: dict[str, ProgramEntry]
    tensors: tuple[TensorEntry, ...]
    adapter_tensors: tuple[TensorEntry, ...] = ()
    threads: int = 1
    memory_bytes: int = 0
    cpu_only: bool = False
    rows: int = 1
    steps_done: int = 0
    state: tuple[StateEntry, ...] = ()
