"""How much memory one stage takes, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from confidantd.planner.workload import (
    FLOAT_BYTES,
    Form,
    Method,
    Workload,
    held_bytes,
    trained_parameters,
)
from confidantd.schedule.one_f_one_b import in_flight

# A worker with numpy, onnxruntime and its links: 73 MiB when it begins, 17 for sessions and the
# code that they run, 8 for TLS and frames on their way, 2 that runs differ by; measured.
RUNTIME_BYTES = 100 * 1024 * 1024
TIED_BYTES = 8 * 1024 * 1024  # pieces of a tied table's gradient that are on their way, measured
PROVIDER_BYTES = 180 * 1024 * 1024  # a further provider in the worker: OpenVINO's, measured
# A provider that does not share the host's memory copies a block's weights into the programs
# of its forward and backward, and its gradients into and out of the latter.
PROVIDER_COPIES = {"full": 4, "lora": 2, None: 1}
# The head computes chunks of so many tokens that its logits stay within this. With 32,000 words
# a token takes 0.86 ms 256 at a time, 0.92 at 128, 1.08 at 64, 1.34 at 32.
HEAD_BYTES: Mapping[Form, int] = {"saved": 64 * 1024 * 1024, "recompute": 16 * 1024 * 1024}
LEAST_CHUNK = 32  # tokens; 16 at a time would take twice as long as 64
LOGIT_COPIES = 2  # logits, and their exponentials
# How many arrays of a kind a block's backward has at a time. With these, stages of Llama and
# GPT-2, 384 and 768 wide, 2 x 128 and 2 x 256 tokens, take what is said or up to 7 % less.
ATTENTION_COPIES = 3  # scores, probabilities and their gradients [b, H, S, S]
# gate, up, their product and the gradients [b, S, columns]; they are held for those of weights
COLUMN_COPIES: Mapping[Method | None, int] = {"full": 6, "lora": 4, None: 4}
# residuals, norms, q, k, v and their gradients [b, S, D]
HIDDEN_COPIES: Mapping[Method | None, int] = {"full": 9, "lora": 5, None: 5}
# A prompt goes in chunks of which the scores, over all positions before, take no more than this;
# each is longer than the last one's, so the arena has pieces of several sizes for them.
PREFILL_BYTES, MOST_PREFILL, PREFILL_COPIES = 16 * 1024 * 1024, 256, 3
LEFT_ROWS = 1.55  # times what several requests at once hold; at most 1.51 measured
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
    held = held_bytes(work, layers, embedding=embedding, head=head)
    held += FLOAT_BYTES * layers * work.block_adapter if work.method != "full" else 0
    trained = trained_parameters(work, layers, embedding=embedding, head=head)
    kept = 0
    if work.method is not None:
        flying = in_flight(stage, stages, work.microbatches)
        each = layers if form == "saved" else 2 * layers  # and the middle of each block
        kept = flying * (each + (1 if head else 0)) * work.activation_bytes
        # the recompute form has the rest only of the block whose backward runs
        copies = flying * layers if form == "saved" else min(1, layers)
        kept += copies * FLOAT_BYTES * work.saved_floats
    apart = work.tied and work.method == "full" and embedding != head
    return MemoryEstimate(
        weights=held,
        gradients=FLOAT_BYTES * trained,
        moments=2 * FLOAT_BYTES * trained,
        kept=kept,
        cache=_cache_bytes(work, layers),
        workspace=_workspace_bytes(work, form, blocks=layers > 0, head=head),
        providers=providers * _provider_bytes(work, form, head=head),
        runtime=RUNTIME_BYTES + (TIED_BYTES if apart else 0),
    )


def _provider_bytes(work: Workload, form: Form, *, head: bool) -> int:
    """Of one further backend, at the most: as if it had nearly all of a block and the head."""
    held = work.block_parameters
    if head and work.method is not None:
        held += work.head_parameters
    floats = PROVIDER_COPIES[work.method] * held
    if head and work.method is not None:
        floats += _logit_floats(work, form)
    return PROVIDER_BYTES + FLOAT_BYTES * floats


def _cache_bytes(work: Workload, layers: int) -> int:
    """Keys and values of every position of every request, in buffers that grow by a quarter, and
    of one block twice while they grow. Rows of a batch that others have left stay as they are.
    """
    if work.method is not None:
        return 0
    block = 2 * FLOAT_BYTES * work.kv_width * work.sequence_length
    rows = work.requests if work.requests == 1 else work.requests * LEFT_ROWS
    return int(block * rows * layers * 5 / 4) + block * min(1, layers)


def prefill_chunk(heads: int, length: int) -> int:
    """How many tokens of a prompt of `length` are run at a time."""
    return min(MOST_PREFILL, max(LEAST_CHUNK, PREFILL_BYTES // (FLOAT_BYTES * heads * length)))


def _workspace_bytes(work: Workload, form: Form, *, blocks: bool, head: bool) -> int:
    """What programs need while they run. Those of blocks and head share one arena, but what the
    one leaves free has not the sizes that the other asks for, so they are added up.
    """
    tokens, length = work.tokens, work.sequence_length
    attention = ATTENTION_COPIES * work.microbatch_size * work.heads * length * length
    if work.method is None:
        tokens = min(length, prefill_chunk(work.heads, length))
        attention = PREFILL_COPIES * work.heads * tokens * (length + tokens)
    floats = 0
    if blocks:
        floats += attention
        floats += COLUMN_COPIES[work.method] * tokens * work.columns
        floats += HIDDEN_COPIES[work.method] * tokens * work.hidden
    if head and work.method is not None:
        floats += _logit_floats(work, form)
    return FLOAT_BYTES * floats


def _logit_floats(work: Workload, form: Form) -> int:
    """Of the largest chunk: even chunks of more tokens may be smaller, and so need less."""
    return LOGIT_COPIES * min(work.tokens, _most_tokens(work.vocabulary, form)) * work.vocabulary


def head_chunk(tokens: int, vocabulary: int, form: Form) -> int:
    """How many of `tokens` the head takes at a time: even chunks within `HEAD_BYTES`."""
    return -(-tokens // -(-tokens // _most_tokens(vocabulary, form)))


def _most_tokens(vocabulary: int, form: Form) -> int:
    return max(LEAST_CHUNK, HEAD_BYTES[form] // (LOGIT_COPIES * FLOAT_BYTES * vocabulary))
