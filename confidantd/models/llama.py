"""Llama (2, 3, SmolLM): RMS norm, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from confidantd.errors import ModelError, UnsupportedArchitectureError
from confidantd.models.activations import activation_of
from confidantd.models.config import Config
from confidantd.models.spec import BlockSpec, ModelSpec, RopeSpec


class Llama:
    """`LlamaForCausalLM`."""

    names: ClassVar[Mapping[str, str]] = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    block_names: ClassVar[Mapping[str, str]] = {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    default_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    output_major = True

    def block_prefix(self, layer: int) -> str:
        """`model.layers.<n>.`"""
        return f"model.layers.{layer}."

    def canonical_name(self, name: str) -> str:
        """Names of a bare `LlamaModel` lack the `model.`."""
        bare = name.startswith(("layers.", "embed_tokens.", "norm."))
        return f"model.{name}" if bare else name

    def spec(self, config: Config) -> ModelSpec:
        """The model; refuses what `LlamaForCausalLM` would not compute this way."""
        return ModelSpec(
            family="llama",
            block=_block(config),
            layers=config.size("num_hidden_layers", 32),
            vocabulary=config.size("vocab_size", 32000),
            max_positions=config.size("max_position_embeddings", 2048),
            positions="rope",
            tied=config.flag("tie_word_embeddings", False),
        )


def _block(config: Config) -> BlockSpec:
    hidden, heads = (
        config.size("hidden_size", 4096),
        config.size("num_attention_heads", 32),
    )
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", hidden // heads or None)
    if heads % kv_heads:
        raise ModelError(f"{config.where}: {heads} heads cannot share {kv_heads} key-value heads")
    if head_dim % 2:
        raise ModelError(f"{config.where}: head_dim must be even, not {head_dim}")
    return BlockSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        columns=config.size("intermediate_size", 11008),
        norm="rms",
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        activation=activation_of(config, "hidden_act", "silu"),
        gated=True,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        fused_qkv=False,
        causal=True,
        rope=rope_of(config),
    )


def rope_of(config: Config) -> RopeSpec:
    """Rotary settings: `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    newer = config.has("rope_parameters")
    scaling = config.part("rope_parameters" if newer else "rope_scaling")
    config.refuse("partial_rotary_factor", 1)
    scaling.refuse("partial_rotary_factor", 1)
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    match kind:
        case "default":
            return RopeSpec(theta)
        case "linear":
            return RopeSpec(theta, "linear", scaling.number("factor"))
        case "llama3":
            low, high = (scaling.number(f"{end}_freq_factor") for end in ("low", "high"))
            if low >= high:
                raise ModelError(f"{scaling.where}: low_freq_factor must be under high_freq_factor")
            return RopeSpec(
                theta,
                "llama3",
                scaling.number("factor"),
                low,
                high,
                scaling.size(
                    "original_max_position_embeddings",
                    config.size("max_position_embeddings", 2048),
                ),
            )
    raise UnsupportedArchitectureError(
        f"{scaling.where}: rope_type {kind!r:.40} is not supported",
        "supported: default, linear, llama3",
    )
