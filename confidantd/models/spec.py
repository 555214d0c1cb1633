"""What a model is, independent of any framework: read from `config.json`, sent between devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Method = Literal["full", "lora"]
Form = Literal["saved", "recompute"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions. `kind` is `default`, `linear` or `llama3` (the last four fields)."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One transformer block; all blocks of a model share it.

    `hidden` is the residual width D, `heads` H query heads over `kv_heads` K
    (H / K query heads make one GQA group), `columns` the MLP's inner width.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    columns: int
    norm: Norm
    norm_epsilon: float
    activation: Activation
    gated: bool
    attention_bias: bool
    mlp_bias: bool
    fused_qkv: bool
    causal: bool
    rope: RopeSpec | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole causal language model: `layers` equal blocks between embedding and head.

    `quantised` names the format of the matrices of blocks, where they have one (generation).
    """

    family: str
    block: BlockSpec
    layers: int
    vocabulary: int
    max_positions: int
    positions: Positions
    tied: bool
    end_tokens: tuple[int, ...] = ()
    quantised: str = ""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA as `peft` defines it: W + (alpha / rank) B A on modules whose name ends in a target."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class ProgramRequest:
    """What the compiler needs to make every program of one job.

    `microbatch_size` b and `sequence_length` S fix the training shapes; generation
    programs take any batch and length and ignore both. `split` asks for the programs of
    parts of blocks, instead of those of whole blocks and the model's ends.
    """

    model: ModelSpec
    purpose: Literal["train", "generate"]
    method: Method = "full"
    lora: LoraSpec | None = None
    microbatch_size: int = 1
    sequence_length: int = 1
    split: bool = False

    @classmethod
    def of(
        cls, model: ModelSpec, method: Method | None, lora: LoraSpec | None, rows: int, length: int
    ) -> ProgramRequest:
        """For training by a method, or for generation without one, where none has an adapter."""
        if method is None:
            return cls(model, "generate")
        return cls(model, "train", method, lora, rows, length)
