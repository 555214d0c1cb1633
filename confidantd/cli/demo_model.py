"""The demo's own small Llama, byte tokenizer and text, made on the spot from a seed.

Run as `python -m confidantd.cli.demo_model FOLDER`, so that numpy and tokenizers
stay out of the CLI process.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from confidantd.models.safetensors import Piece, write_file

HIDDEN, LAYERS, HEADS, KV_HEADS, COLUMNS = 64, 6, 4, 2, 172
MAX_POSITIONS = 256
END_OF_TEXT = "<|endoftext|>"
INITIAL_DEVIATION = 0.02  # as transformers initialises a Llama
SENTENCES = 1_500

_WHO = ("phone", "laptop", "old tablet", "little board", "desktop", "e-reader")
_DOES = (
    "holds two layers",
    "sends its activations on",
    "waits for the gradient",
    "takes the next microbatch",
    "keeps its weights at home",
    "finishes its share first",
)
_WHEN = ("while the kettle boils", "at night", "over the Wi-Fi", "on one charge", "with the others")


def main(folder: Path) -> None:
    """Write `model/` and `text.txt` into `folder`."""
    model = folder / "model"
    model.mkdir(parents=True)
    vocabulary = _write_tokenizer(model)
    config = _config(vocabulary)
    (model / "config.json").write_text(json.dumps(config, indent=2))
    _write_weights(model, config)
    (folder / "text.txt").write_text(_text())


def _text() -> str:
    """Short sentences that a tiny model can learn in a minute."""
    pick = random.Random(7)  # noqa: S311 - a text, not a secret
    return " ".join(
        f"The {pick.choice(_WHO)} {pick.choice(_DOES)} {pick.choice(_WHEN)}."
        for _ in range(SENTENCES)
    )


def _write_tokenizer(model: Path) -> int:
    """A byte-level tokenizer without merges; gives the vocabulary's size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return int(tokenizer.get_vocab_size())


def _config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "intermediate_size": COLUMNS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": None,
        "dtype": "float32",
    }


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    key_width = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (key_width, HIDDEN),
            prefix + "self_attn.v_proj.weight": (key_width, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (COLUMNS, HIDDEN),
            prefix + "mlp.up_proj.weight": (COLUMNS, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, COLUMNS),
        }
    return shapes


def _write_weights(model: Path, config: dict[str, object]) -> None:
    generator = np.random.default_rng(11)
    pieces = []
    for name, shape in _shapes(int(str(config["vocab_size"]))).items():
        if len(shape) == 1:
            values = np.ones(shape, dtype="<f4")
        else:
            values = (generator.standard_normal(shape) * INITIAL_DEVIATION).astype("<f4")
        pieces.append(Piece(name, "F32", shape, values.tobytes()))
    write_file(model / "model.safetensors", pieces)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
