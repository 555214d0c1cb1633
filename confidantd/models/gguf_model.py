"""What a GGUF file says of its model, as a `config.json` and the places of its tensors by the names
that `transformers` gives them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from confidantd.errors import CorruptFileError, MissingTensorError, UnsupportedArchitectureError
from confidantd.models.config import Config
from confidantd.models.gguf import GgufHeader, GgufTensor
from confidantd.models.gguf_format import GgufFormat
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import RopeSpec

ARCHITECTURES = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KNOWN = {  # settings of the architecture that are computed, or change nothing
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "tensor_data_layout", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CLOSE = 1e-3  # of the factors of frequencies, which a file has in float32


def config_of(header: GgufHeader) -> dict[str, Any]:
    """The `config.json`; `UnsupportedArchitectureError` names what cannot be computed."""
    own = _own_settings(header)
    hidden, heads = own.size("embedding_length"), own.size("attention.head_count")
    kv_heads = own.size("attention.head_count_kv", heads)
    head_dim = own.size("attention.key_length", hidden // heads or None)
    for key in ("attention.value_length", "rope.dimension_count"):
        own.refuse(key, head_dim)
    if "token_embd.weight" not in header.tensors:
        raise MissingTensorError(f"{header.path} lacks the tensor token_embd.weight")
    theta = own.number("rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": own.size("feed_forward_length"),
        "num_hidden_layers": own.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, own, theta, head_dim),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": own.size("context_length"),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(header),
    }


def _own_settings(header: GgufHeader) -> Config:
    """The settings of the architecture, without its name; one number of all layers for lists."""
    architecture = Config(header.fields, str(header.path)).text("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"{header.path}: the architecture {architecture!r:.40} is not read from GGUF files",
            f"supported: {', '.join(ARCHITECTURES)}",
        )
    prefix = f"{architecture}."
    found = {}
    for key, value in header.fields.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if name not in _KNOWN and value:
            raise UnsupportedArchitectureError(
                f"{header.path}: {key!r:.80} = {value!r:.40} is not supported",
                "use a model without this setting",
            )
        same = isinstance(value, list) and value and value.count(value[0]) == len(value)
        found[name] = value[0] if same else value
    return Config(found, f"{header.path}: {architecture}")


def _end_tokens(header: GgufHeader) -> list[int]:
    ends = (header.fields.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS)
    return list(dict.fromkeys(token for token in ends if type(token) is int))


def _rope_scaling(
    header: GgufHeader, own: Config, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Of `config.json`. Llama 3's is in the file as what each frequency is divided by."""
    kind = own.text("rope.scaling.type", "none")
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is not None:
        own.refuse("rope.scaling.type", "none")
        return _llama3(header, tensor, theta, head_dim)
    if kind == "none":
        return None
    own.refuse("rope.scaling.type", "linear")
    return {"rope_type": "linear", "factor": own.number("rope.scaling.factor")}


def _llama3(
    header: GgufHeader, tensor: GgufTensor, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The settings that give the same factors: Llama 3's own, or those of another context."""
    wanted = _numbers(header, tensor, head_dim // 2)
    if all(abs(factor - 1) < _CLOSE for factor in wanted):
        return None
    plain = rope_frequencies(RopeSpec(theta), head_dim)
    for context in (8192, *(2**power for power in range(4, 21))):
        rope = RopeSpec(theta, "llama3", max(wanted), 1.0, 4.0, context)
        scaled = rope_frequencies(rope, head_dim)
        factors = [one / other for one, other in zip(plain, scaled, strict=True)]
        if all(abs(f / w - 1) < _CLOSE for f, w in zip(factors, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_frequency_factor,
                "high_freq_factor": rope.high_frequency_factor,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedArchitectureError(
        f"{header.path}: the factors of {ROPE_FACTORS} are not those of Llama 3",
        "use a model without this setting",
    )


def _numbers(header: GgufHeader, tensor: GgufTensor, count: int) -> list[float]:
    if tensor.type.name != "F32" or tensor.shape != (count,):
        raise CorruptFileError(f"{header.path}: {tensor.name} is not {count} numbers of type F32")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        found = struct.unpack(f"<{count}f", file.read(tensor.bytes))
    if not all(0 < factor < 1e6 for factor in found):
        raise CorruptFileError(f"{header.path}: {tensor.name} has a number that cannot be true")
    return list(found)


def places_of(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Where each tensor of the model lies, by its name in `transformers`."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in header.tensors.values():
        name = _name(tensor.name)
        if name is None:
            continue
        form = GgufFormat(tensor.type, heads.get(tensor.name.split(".")[-2], 0))
        if not form.fits(tensor.shape):
            raise CorruptFileError(
                f"{header.path}: {tensor.name!r:.80} of type {tensor.type.name} has shape "
                f"{list(tensor.shape)}"
            )
        found[name] = {
            "dtype": form.dtype,
            "shape": list(tensor.shape),
            "offset": tensor.offset,
            "bytes": tensor.bytes,
        }
    return found


def _name(name: str) -> str | None:
    """The name in `transformers`; None for what is no tensor of the model."""
    if name in _ENDS:
        return _ENDS[name]
    match name.split("."):
        case ["blk", number, module, ("weight" | "bias") as kind] if module in _MODULES:
            return f"model.layers.{number}.{_MODULES[module]}.{kind}"
    return None
