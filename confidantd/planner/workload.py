"""What a plan is made for: sizes of the model's parts and of a step; plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FLOAT_BYTES = 4
# Of a forward that the recompute form runs a second time: all but its two last products;
# measured on a Llama block of 768.
RECOMPUTED_SHARE = 0.75
Method = Literal["full", "lora"]
Form = Literal["saved", "recompute"]
# Forwards that forward and backward together cost: frozen weights need no gradient of their own.
PASSES: Mapping[Method | None, float] = {"full": 3.0, "lora": 2.0, None: 1.0}


@dataclass(frozen=True, slots=True)
class Workload:
    """Parameter counts and shapes. `method` None is generation.

    `block_adapter` counts LoRA weights of one block. `sequence_length` S is the
    training length, or prompt plus new tokens. `tied`: head and embedding share a table.
    `saved_floats` is what one block keeps of one microbatch in the saved form. `splits`:
    its blocks are large enough for a device's backends to share them out. `load`: so many
    requests are served at once, each as long as `sequence_length`; 0 is one that is generated.
    `block_bytes`, `embedding_bytes` and `head_bytes`: where weights are quantised; 0: none are.
    """

    model: str
    layers: int
    block_parameters: int
    block_adapter: int
    embedding_parameters: int
    head_parameters: int
    tied: bool
    hidden: int
    vocabulary: int
    heads: int
    head_dim: int
    kv_width: int
    columns: int
    microbatch_size: int
    microbatches: int
    sequence_length: int
    method: Method | None
    saved_floats: int = 0
    splits: bool = False
    load: int = 0
    block_bytes: int = 0
    embedding_bytes: int = 0
    head_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in one microbatch."""
        return self.microbatch_size * self.sequence_length

    @property
    def requests(self) -> int:
        """Sequences that are generated at the same time."""
        return max(1, self.load)

    @property
    def activation_bytes(self) -> int:
        """One microbatch between two stages: [b, S, D] in training, one token in generation."""
        return FLOAT_BYTES * self.hidden * (self.tokens if self.method else 1)


def stage_flops(work: Workload, layers: int, *, head: bool) -> float:
    """Floating-point operations of one microbatch on a stage (of one token in generation).

    A product with n weights costs 2n a token, exact attention 4 S H Dh a token.
    The backward costs two forwards in full fine-tuning and about one with frozen weights.
    """
    tokens = work.tokens if work.method else 1
    attention = 4 * work.sequence_length * work.heads * work.head_dim
    block = tokens * (2 * (work.block_parameters + work.block_adapter) + attention)
    return PASSES[work.method] * layers * block + (head_flops(work) if head else 0.0)


def head_flops(work: Workload) -> float:
    """Floating-point operations of the head for one microbatch (of one token in generation)."""
    tokens = work.tokens if work.method else 1
    return PASSES[work.method] * 2 * tokens * work.hidden * work.vocabulary


def held_parameters(work: Workload, layers: int, *, embedding: bool, head: bool) -> int:
    """Parameters of the model on a stage, without an adapter's; a tied table counts once."""
    ends = work.embedding_parameters if embedding else 0
    if head and not (work.tied and embedding):
        ends += work.head_parameters
    return layers * work.block_parameters + ends


def held_bytes(work: Workload, layers: int, *, embedding: bool, head: bool) -> int:
    """Of the model's weights on a stage, without an adapter's."""
    if not work.block_bytes:
        return FLOAT_BYTES * held_parameters(work, layers, embedding=embedding, head=head)
    ends = work.embedding_bytes if embedding else 0
    if head and not (work.tied and embedding):
        ends += work.head_bytes
    return layers * work.block_bytes + ends


def trained_parameters(work: Workload, layers: int, *, embedding: bool, head: bool) -> int:
    """Parameters that the optimizer changes on a stage."""
    if work.method == "full":
        return held_parameters(work, layers, embedding=embedding, head=head)
    return layers * work.block_adapter if work.method == "lora" else 0
