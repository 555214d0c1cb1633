"""Specs from config.json, tensor names of stages, adapters and program requests."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from confidantd.errors import (
    MissingTensorError,
    ModelError,
    UnsupportedArchitectureError,
    UsageError,
)
from confidantd.models.adapter import adapter_config, adapter_tensor_names, read_adapter
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.programs import request_key
from confidantd.models.safetensors import Piece, write_file
from confidantd.models.spec import LoraSpec, ModelSpec, ProgramRequest, RopeSpec
from confidantd.models.tensors import (
    block_parameters,
    check_targets,
    default_targets,
    embedding_parameters,
    head_parameters,
    lora_parameters,
    stage_sources,
    stage_tensor_names,
)
from tests.unit.model_files import GPT2, LLAMA


def spec_of(base: Any, **changes: Any) -> ModelSpec:
    """The spec of a changed config."""
    return spec_from_config(Config({**base, **changes}, "config.json"))


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({}, RopeSpec(10000.0)),
        ({"rope_theta": 5e5}, RopeSpec(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeSpec(7.0)),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeSpec(9.0, "linear", 2.0),
        ),
        (
            {"rope_theta": 9.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeSpec(9.0, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, **LLAMA3}},
            RopeSpec(9.0, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rotary_settings_of_new_and_old_files(settings: dict[str, Any], rope: RopeSpec) -> None:
    """`rope_parameters`, or `rope_theta` with `rope_scaling`."""
    assert spec_of(LLAMA, **settings).block.rope == rope


@pytest.mark.parametrize(
    ("base", "changes", "setting"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "gelu_fast"}, "gelu_fast"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(
    base: Any, changes: dict[str, Any], setting: str
) -> None:
    """The message names the setting."""
    with pytest.raises(UnsupportedArchitectureError, match=setting):
        spec_of(base, **changes)


@pytest.mark.parametrize(
    ("base", "changes", "setting"),
    [
        (LLAMA, {"hidden_size": 0}, "hidden_size"),
        (LLAMA, {"hidden_size": "8"}, "hidden_size"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps"),
        (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps"),
        (LLAMA, {"attention_bias": "no"}, "attention_bias"),
        (LLAMA, {"num_key_value_heads": 3}, "key-value heads"),
        (LLAMA, {"head_dim": 3}, "head_dim"),
        (LLAMA, {"rope_scaling": 3}, "rope_scaling"),
        (GPT2, {"n_head": 3}, "n_head"),
    ],
)
def test_senseless_settings_are_named(base: Any, changes: dict[str, Any], setting: str) -> None:
    """One clear line each."""
    with pytest.raises(ModelError, match=setting):
        spec_of(base, **changes)


def test_ignored_settings() -> None:
    """Dropout is off in training here, and these do not change the result."""
    plain = spec_of(GPT2)
    assert spec_of(GPT2, attn_pdrop=0.5, reorder_and_upcast_attn=True) == plain
    assert spec_of(LLAMA, attention_dropout=0.1, pretraining_tp=2) == spec_of(LLAMA)


@pytest.mark.parametrize("base", [LLAMA, GPT2])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_share_out_all_tensors(base: Any, tied: bool) -> None:
    """Together the stages need the model's tensors; only a tied table is needed twice."""
    spec = spec_of(base, tie_word_embeddings=tied)
    whole = stage_tensor_names(spec, 0, 2, True, True)
    first = stage_tensor_names(spec, 0, 1, True, False)
    last = stage_tensor_names(spec, 1, 2, False, True)
    assert set(first) | set(last) == set(whole)
    assert len(set(first) & set(last)) == int(tied)
    assert len(whole) == len(set(whole))


@pytest.mark.parametrize("base", [LLAMA, GPT2])
def test_parameter_counts(base: Any) -> None:
    """Sums over the shapes of the checkpoint."""
    spec = spec_of(base, tie_word_embeddings=False)
    sources = stage_sources(spec, 0, spec.layers, embedding=True, head=True)
    total = sum(math.prod(source.shape) for source in sources)
    parts = embedding_parameters(spec) + 2 * block_parameters(spec) + head_parameters(spec)
    assert total == parts


def test_lora_targets() -> None:
    """`peft`'s rule: the whole name or its end after a dot; others are named."""
    llama, gpt2 = spec_of(LLAMA), spec_of(GPT2)
    assert default_targets(llama) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert default_targets(gpt2) == ("c_attn", "attn.c_proj")
    assert lora_parameters(gpt2, LoraSpec(2, 4, ("c_attn",))) == 2 * (8 + 24)
    both = lora_parameters(gpt2, LoraSpec(2, 4, ("c_proj",)))
    assert both == 2 * (8 + 8) + 2 * (32 + 8)
    check_targets(gpt2, ["mlp.c_proj", "c_attn"])
    with pytest.raises(UsageError, match=r"'proj'.*attn.c_attn, attn.c_proj, mlp.c_fc"):
        check_targets(gpt2, ["proj"])
    with pytest.raises(UsageError, match="at least one"):
        check_targets(llama, [])


def write_adapter(folder: Path, spec: ModelSpec, lora: LoraSpec, **changes: Any) -> Path:
    """An adapter of zeros."""
    folder.mkdir(exist_ok=True)
    config = adapter_config(spec, lora, "base") | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pieces = []
    for name in adapter_tensor_names(spec, lora, 0, spec.layers):
        shape = (lora.rank, 8) if "lora_A" in name else (8, lora.rank)
        pieces.append(Piece(name, "F32", shape, bytes(math.prod(shape) * 4)))
    write_file(folder / "adapter_model.safetensors", pieces)
    return folder


def test_adapter_is_read_back(tmp_path: Path) -> None:
    """Settings and tensor places; another model or setting is refused by name."""
    spec, lora = spec_of(LLAMA), LoraSpec(2, 5.0, ("o_proj", "q_proj"))
    found, tensors = read_adapter(write_adapter(tmp_path, spec, lora), spec)
    assert found == lora
    assert tuple(tensors) == adapter_tensor_names(spec, lora, 0, 2)
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    with pytest.raises(ModelError, match="use_dora"):
        read_adapter(write_adapter(tmp_path, spec, lora, use_dora=True), spec)
    with pytest.raises(ModelError, match="peft_type"):
        read_adapter(write_adapter(tmp_path, spec, lora, peft_type="IA3"), spec)
    with pytest.raises(ModelError, match="possible target modules"):
        read_adapter(write_adapter(tmp_path, spec, lora, target_modules=["wq"]), spec)
    with pytest.raises(MissingTensorError, match=r"layers\.2"):
        read_adapter(write_adapter(tmp_path, spec, lora), spec_of(LLAMA, num_hidden_layers=3))
    with pytest.raises(ModelError, match="fits no module"):
        read_adapter(write_adapter(tmp_path, spec, lora), spec_of(LLAMA, num_hidden_layers=1))
    with pytest.raises(ModelError, match="this model needs"):
        read_adapter(write_adapter(tmp_path, spec, lora, r=3), spec)


def test_request_key_is_stable_and_ignores_what_programs_do_not_show() -> None:
    """Layers, names and ends do not change a program; shapes and method do."""
    spec = spec_of(LLAMA)
    one = ProgramRequest(spec, "train", "full", None, 2, 16)
    other = dataclasses.replace(spec, layers=40, tied=True, end_tokens=(1,), max_positions=1)
    assert request_key(one) == request_key(dataclasses.replace(one, model=other))
    lora = LoraSpec(4, 8.0, ("q_proj", "k_proj"))
    keys = {
        request_key(one),
        request_key(dataclasses.replace(one, sequence_length=17)),
        request_key(dataclasses.replace(one, method="lora", lora=lora)),
        request_key(dataclasses.replace(one, purpose="generate")),
        request_key(dataclasses.replace(one, model=spec_of(LLAMA, rms_norm_eps=1e-5))),
        request_key(dataclasses.replace(one, model=spec_of(GPT2))),
    }
    assert len(keys) == 6
    turned = dataclasses.replace(lora, targets=lora.targets[::-1])
    pair = [dataclasses.replace(one, method="lora", lora=spec) for spec in (lora, turned)]
    assert request_key(pair[0]) == request_key(pair[1])


def test_models_need_no_numpy() -> None:
    """The daemon imports them."""
    program = (
        "import sys, confidantd.models.folder, confidantd.models.adapter,"
        " confidantd.models.programs\n"
        "print([m for m in ('numpy', 'torch', 'onnxruntime', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
