"""GPT-2: layer norm, learned positions, one fused query-key-value product, plain MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from confidantd.errors import ModelError
from confidantd.models.activations import activation_of
from confidantd.models.config import Config
from confidantd.models.spec import BlockSpec, ModelSpec


class Gpt2:
    """`GPT2LMHeadModel`; its Conv1D weights are already [in, out]."""

    names: ClassVar[Mapping[str, str]] = {
        "embedding.weight": "transformer.wte.weight",
        "positions.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    }
    block_names: ClassVar[Mapping[str, str]] = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    default_targets = ("c_attn", "attn.c_proj")
    output_major = False

    def block_prefix(self, layer: int) -> str:
        """`transformer.h.<n>.`"""
        return f"transformer.h.{layer}."

    def canonical_name(self, name: str) -> str:
        """Names of a bare `GPT2Model`, as OpenAI published it, lack the `transformer.`."""
        bare = name.startswith(("h.", "wte.", "wpe.", "ln_f."))
        return f"transformer.{name}" if bare else name

    def spec(self, config: Config) -> ModelSpec:
        """The model; refuses what `GPT2LMHeadModel` would not compute this way."""
        config.refuse("scale_attn_weights", True)
        config.refuse("scale_attn_by_inverse_layer_idx", False)
        config.refuse("add_cross_attention", False)
        return ModelSpec(
            family="gpt2",
            block=_block(config),
            layers=config.size("n_layer", 12),
            vocabulary=config.size("vocab_size", 50257),
            max_positions=config.size("n_positions", 1024),
            positions="learned",
            tied=config.flag("tie_word_embeddings", True),
        )


def _block(config: Config) -> BlockSpec:
    hidden, heads = config.size("n_embd", 768), config.size("n_head", 12)
    if hidden % heads:
        raise ModelError(f"{config.where}: n_embd {hidden} is not a multiple of n_head {heads}")
    return BlockSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        columns=config.size("n_inner", 4 * hidden),
        norm="layer",
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        activation=activation_of(config, "activation_function", "gelu_new"),
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        fused_qkv=True,
        causal=True,
        rope=None,
    )
