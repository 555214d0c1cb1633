"""The model families that are built in, by the `model_type` of their `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from confidantd.errors import UnsupportedArchitectureError
from confidantd.models.config import Config
from confidantd.models.gpt2 import Gpt2
from confidantd.models.llama import Llama
from confidantd.models.spec import ModelSpec


class Family(Protocol):
    """How a family names things. Prefixes and names are those that `transformers` writes."""

    @property
    def names(self) -> Mapping[str, str]:
        """Parameter outside of blocks -> checkpoint name."""
        ...

    @property
    def block_names(self) -> Mapping[str, str]:
        """Norm or linear module of a block -> module path within the block."""
        ...

    @property
    def default_targets(self) -> tuple[str, ...]:
        """LoRA's target modules."""
        ...

    @property
    def output_major(self) -> bool:
        """True if linear weights are stored [out, in]."""
        ...

    def block_prefix(self, layer: int) -> str:
        """What stands before `block_names` of a layer, with the dot."""
        ...

    def spec(self, config: Config) -> ModelSpec:
        """The model that a `config.json` describes."""
        ...

    def canonical_name(self, name: str) -> str:
        """A tensor name as in checkpoints of the full model, from one of the bare model."""
        ...


FAMILIES: Mapping[str, Family] = {"llama": Llama(), "gpt2": Gpt2()}


def family_of(model_type: str) -> Family:
    """The family; `UnsupportedArchitectureError` names those that there are."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedArchitectureError(
            f"model type {model_type!r:.60} is not supported",
            f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return family


def spec_from_config(config: Config) -> ModelSpec:
    """The model that a `config.json` describes; says which setting it cannot compute."""
    family = family_of(config.text("model_type", ""))
    config.refuse("quantization_config")
    return family.spec(config)
