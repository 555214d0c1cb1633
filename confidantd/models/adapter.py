"""LoRA adapters as `peft` stores them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confidantd.errors import MissingTensorError, ModelError, UsageError
from confidantd.models.config import Config, read_json
from confidantd.models.families import family_of
from confidantd.models.layout import Linear, lora_layout
from confidantd.models.safetensors import FLOAT_DTYPES, TensorLocation, read_header
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.tensors import (
    Source,
    check_targets,
    default_targets,
    possible_targets,
    target_linears,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED: Mapping[str, tuple[object, ...]] = {  # settings that change the computation
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_rslora": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": ([],),
    "layers_pattern": ([],),
    "layer_replication": ([],),
    "exclude_modules": ([], ""),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "megatron_config": (),
    "alora_invocation_tokens": ([],),
}


def adapter_sources(spec: ModelSpec, lora: LoraSpec, layer: int) -> tuple[Source, ...]:
    """The adapter's tensors in one block: `peft` stores A as [r, in] and B as [out, r]."""
    return tuple(
        source
        for linear in target_linears(spec, lora.targets)
        for source in _linear_sources(spec, lora, layer, linear)
    )


def _linear_sources(
    spec: ModelSpec, lora: LoraSpec, layer: int, linear: Linear
) -> tuple[Source, Source]:
    family = family_of(spec.family)
    module = f"{_PREFIX}{family.block_prefix(layer)}{family.block_names[linear.name]}"
    a, b = lora_layout(linear, lora)
    return (
        Source(a, f"{module}.lora_A.weight", transposed=True),
        Source(b, f"{module}.lora_B.weight", transposed=False),
    )


def adapter_tensor_names(
    spec: ModelSpec, lora: LoraSpec, first: int, past_last: int
) -> tuple[str, ...]:
    """The `peft` names of the adapter's tensors in a range of layers."""
    layers = range(first, past_last)
    return tuple(source.name for n in layers for source in adapter_sources(spec, lora, n))


def read_adapter(folder: Path, spec: ModelSpec) -> tuple[LoraSpec, dict[str, TensorLocation]]:
    """The adapter in `folder` for the model `spec`; `ModelError` says what does not fit."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "give an adapter folder as peft writes it")
    config = Config(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
    lora = _lora_spec(config, spec)
    stored = read_header(folder / ADAPTER_WEIGHTS)
    tensors = {}
    for layer in range(spec.layers):
        for source in adapter_sources(spec, lora, layer):
            tensors[source.name] = _checked(folder, source, stored)
    unknown = sorted(set(stored) - set(tensors))
    if unknown:
        raise ModelError(f"{folder}: the adapter's tensor {unknown[0]!r:.120} fits no module")
    return lora, tensors


def _lora_spec(config: Config, spec: ModelSpec) -> LoraSpec:
    config.refuse("peft_type", "LORA")
    for key, accepted in _REFUSED.items():
        config.refuse(key, *accepted)
    targets = config.raw("target_modules")
    if targets == "all-linear":
        targets = list(possible_targets(spec))
    if targets is None:
        targets = list(default_targets(spec))
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError(f"{config.where}: target_modules must be a list of names")
    try:
        check_targets(spec, targets)
    except UsageError as failure:
        raise ModelError(f"{config.where}: {failure.message}", failure.hint) from None
    rank = config.size("r", 8)
    return LoraSpec(rank, config.number("lora_alpha", 8), tuple(sorted(targets)))


def _checked(folder: Path, source: Source, stored: Mapping[str, TensorLocation]) -> TensorLocation:
    location = stored.get(source.name)
    if location is None:
        raise MissingTensorError(
            f"{folder} lacks the adapter tensor {source.name}",
            "was it made for this model?",
        )
    if location.shape != source.shape or location.dtype not in FLOAT_DTYPES:
        raise ModelError(
            f"{location.file}: {source.name} is {location.dtype} {list(location.shape)}, "
            f"this model needs {list(source.shape)}",
            "was it made for this model?",
        )
    return location


def adapter_config(spec: ModelSpec, lora: LoraSpec, base_model_path: str) -> dict[str, Any]:
    """The content of adapter_config.json, as `peft.LoraConfig.from_pretrained` reads it."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_path,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "fan_in_fan_out": not family_of(spec.family).output_major,
        "init_lora_weights": True,
    }
