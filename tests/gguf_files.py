"""Small Llama models as GGUF files, in the order in which `llama.cpp` stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

SPREAD = 0.12  # of random weights
# Of blocks of random bytes: where the float16 factors stand, and what they have to be for weights
# of this spread around zero.
_FACTORS: Mapping[str, Mapping[int, float]] = {
    "Q4_0": {0: SPREAD / 4.6},
    "Q4_1": {0: SPREAD / 4.6, 2: -7.5 * SPREAD / 4.6},
    "Q5_0": {0: SPREAD / 9.2},
    "Q5_1": {0: SPREAD / 9.2, 2: -15.5 * SPREAD / 9.2},
    "Q8_0": {0: SPREAD / 74},
    "Q4_K": {0: SPREAD / 200, 2: 7.5 * SPREAD / 200},
    "Q5_K": {0: SPREAD / 400, 2: 15.5 * SPREAD / 400},
    "Q6_K": {208: SPREAD / 1400},
}
QUANTISED = tuple(_FACTORS)
_MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The name of a tensor of `transformers` in a file."""
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{_MODULES['.'.join(module)]}.{kind}"


def random_blocks(
    kind: str, rows: int, width: int, seed: int, spread: float = SPREAD
) -> NDArray[np.uint8]:
    """A matrix of this type, as bytes [rows, bytes]."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width // block, size), np.uint8)
    for start, factor in _FACTORS[kind].items():
        scaled = np.array([factor * spread / SPREAD], np.float16)
        raw[..., start : start + 2] = scaled.view(np.uint8)
    return raw.reshape(rows, -1)


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The rows of a query or key matrix in the order of a file."""
    parts = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return parts.swapaxes(1, 2).reshape(rows.shape)


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """What a file says of the sizes of its model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def describe_tokenizer(
    tokenizer: Mapping[str, Any], *, pre: str = "", **fields: Any
) -> Callable[[gguf.GGUFWriter], None]:
    """What a file says of a tokenizer.json; without a way to cut words it is SentencePiece's kind,
    whose tokens have scores instead of merges. `fields` are further ones, `bos_token_id` and so on.
    """
    ids = dict(tokenizer["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda text: ids[text])
    kinds = {token["content"]: 3 if token["special"] else 4 for token in tokenizer["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2" if pre else "llama")
        writer.add_token_list(tokens)
        writer.add_token_types([kinds.get(text, 1) for text in tokens])
        if pre:
            writer.add_tokenizer_pre(pre)
            writer.add_token_merges(merges)
        else:
            made = {merge.replace(" ", ""): -1.0 - n for n, merge in reversed([*enumerate(merges)])}
            writer.add_token_scores([made.get(text, -1e6) for text in tokens])
        for name, value in fields.items():
            adding = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            adding(f"tokenizer.ggml.{name}", value)

    return describe


def llama3_factors(config: Any) -> NDArray[np.float32] | None:
    """What each frequency is divided by, as `llama.cpp`'s converter writes it."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    inverse = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    waves, context = 2 * np.pi / inverse, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    found = np.where(waves < context / high, 1.0, between)
    return np.where(waves > context / low, rope["factor"], found).astype(np.float32)


def write_gguf(
    path: Path,
    model: Any,
    kind_of: Callable[[str], str],
    describe: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    *,
    made_up: bool = True,
    spread: float = SPREAD,
    seed: int = 0,
) -> Path:
    """Write a `LlamaForCausalLM` with matrices of the types of `kind_of` (by their names in the
    file); `model` gets what they are worth. Quantised ones are `made_up` at random, in blocks with
    this `spread`; otherwise they are the nearest to the model's, in float16 where rows are no
    whole blocks, as `llama.cpp` does.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, config)
    describe(writer)
    factors = llama3_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for number, (name, parameter) in enumerate(model.named_parameters(), 1000 * seed):
        target = gguf_name(name)
        kind = "F32" if parameter.dim() == 1 else kind_of(target)
        order = np.arange(len(parameter))
        if target.split(".")[-2] in heads:
            order = interleaved(order[:, None], heads[target.split(".")[-2]])[:, 0]
        if (
            kind in QUANTISED
            and parameter.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
        ):
            kind = "F16"
        if kind in QUANTISED:
            if made_up:
                its = spread if target.startswith("blk.") else SPREAD
                stored = random_blocks(kind, *parameter.shape, number, its)
            else:
                stored = quantize(parameter.detach().numpy(), GGMLQuantizationType[kind])
            values = dequantize(stored, GGMLQuantizationType[kind])
            writer.add_tensor(target, stored[order], raw_dtype=GGMLQuantizationType[kind])
        elif kind == "BF16":
            values = parameter.detach().to(torch.bfloat16).float().numpy()
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)[order]
            writer.add_tensor(target, bits.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
        else:
            dtype = {"F32": np.float32, "F16": np.float16}[kind]
            stored = parameter.detach().numpy().astype(dtype)
            values = stored.astype(np.float32)
            writer.add_tensor(target, stored[order])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
