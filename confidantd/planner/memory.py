"""How much memory one stage takes, by kind."""

from __future__ import annotations

from dataclasses import dataclass, fields

from confidantd.planner.workload import (
    FLOAT_BYTES,
    Form,
    Workload,
    held_parameters,
    trained_parameters,
)
from confidantd.schedule.one_f_one_b import in_flight

RUNTIME_BYTES = 90 * 1024 * 1024  # a worker with numpy, onnxruntime and its links, measured
PROVIDER_BYTES = 180 * 1024 * 1024  # a further provider in the worker: OpenVINO's, measured
# A provider that does not share the host's memory copies a block's weights into the programs
# of its forward and backward, and its gradients out of the latter.
PROVIDER_COPIES = {"full": 3, "lora": 2, None: 1}
# The head computes chunks of so many tokens that its logits stay within this. A head of 32,000
# tokens' vocabulary takes 0.86 ms a token 256 at a time, 0.94 at 128, 1.08 at 64, 1.4 at 32.
HEAD_BYTES = 64 * 1024 * 1024
LOGIT_COPIES = 2  # logits, and their exponentials
ATTENTION_COPIES = 4  # scores, probabilities and their gradients [b, H, S, S]
COLUMN_COPIES = 6  # gate, up, their product and the gradients [b, S, columns]
HIDDEN_COPIES = 12  # residuals, norms, q, k, v and their gradients [b, S, D]


# How far a stage may be over what was planned before it is ended: the error of this model.
MODEL_ERROR = 0.10


def enforced_bytes(granted: int, left: int) -> int:
    """The most that a stage may use: what it was granted and the error of the model, as far as
    the device has that `left` beside what it granted.
    """
    return granted + max(0, min(int(MODEL_ERROR * granted), left))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one stage. `kept`: inputs of blocks and head, of the microbatches in flight,
    and what the blocks' forwards saved: all of it in the saved form, else the middle of
    each block. `providers`: what further backends than the CPU's take.
    """

    weights: int
    gradients: int
    moments: int
    kept: int
    cache: int
    workspace: int
    providers: int = 0
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


def stage_memory(
    work: Workload,
    layers: int,
    *,
    embedding: bool,
    head: bool,
    stage: int,
    stages: int,
    form: Form = "recompute",
    providers: int = 0,
) -> MemoryEstimate:
    """The estimate for a stage of `layers` blocks, at place `stage` of `stages`, whose blocks
    are shared out between the CPU and `providers` further backends.
    """
    held = held_parameters(work, layers, embedding=embedding, head=head)
    held += layers * work.block_adapter if work.method == "lora" else 0
    trained = trained_parameters(work, layers, embedding=embedding, head=head)
    kept = 0
    if work.method is not None:
        flying = in_flight(stage, stages, work.microbatches)
        each = layers if form == "saved" else 2 * layers  # and the middle of each block
        kept = flying * (each + (1 if head else 0)) * work.activation_bytes
        # the recompute form has the rest only of the block whose backward runs
        copies = flying * layers if form == "saved" else min(1, layers)
        kept += copies * FLOAT_BYTES * work.saved_floats
    return MemoryEstimate(
        weights=FLOAT_BYTES * held,
        gradients=FLOAT_BYTES * trained,
        moments=2 * FLOAT_BYTES * trained,
        kept=kept,
        cache=_cache_bytes(work, layers),
        workspace=_workspace_bytes(work, head=head),
        providers=providers * _provider_bytes(work, head=head),
    )


def _provider_bytes(work: Workload, *, head: bool) -> int:
    """Of one further backend, at the most: as if it had nearly all of a block and the head."""
    held = work.block_parameters
    if head and work.method is not None:
        held += work.head_parameters
    floats = PROVIDER_COPIES[work.method] * held
    if head and work.method is not None:
        floats += LOGIT_COPIES // 2 * work.tokens * work.vocabulary
    return PROVIDER_BYTES + FLOAT_BYTES * floats


def _cache_bytes(work: Workload, layers: int) -> int:
    """Keys and values of every position, twice while a step makes the new cache."""
    if work.method is not None:
        return 0
    return 2 * 2 * FLOAT_BYTES * layers * work.kv_width * work.sequence_length


def _workspace_bytes(work: Workload, *, head: bool) -> int:
    """The larger of what a block's program and the head's program need while they run."""
    tokens, length = work.tokens, work.sequence_length
    attention = work.microbatch_size * work.heads * length * length
    floats = (
        ATTENTION_COPIES * attention
        + COLUMN_COPIES * tokens * work.columns
        + HIDDEN_COPIES * tokens * work.hidden
    )
    if work.method == "full":
        floats += work.block_parameters  # a block's gradients before they are added up
    if head and work.method is not None:
        logits = LOGIT_COPIES * tokens * work.vocabulary
        table = work.head_parameters if work.method == "full" else 0
        floats = max(floats, logits + table)
    return FLOAT_BYTES * floats


def head_chunk(tokens: int, vocabulary: int) -> int:
    """How many of `tokens` the head takes at a time: even chunks within `HEAD_BYTES`."""
    most = max(1, HEAD_BYTES // (LOGIT_COPIES * FLOAT_BYTES * vocabulary))
    return -(-tokens // -(-tokens // most))
