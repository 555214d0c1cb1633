"""Model folders without weights of meaning: headers, shapes and zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.safetensors import Piece, write_file
from confidantd.models.tensors import stage_sources

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 11,
    "eos_token_id": 2,
}
GPT2: Mapping[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 16,
    "vocab_size": 11,
    "eos_token_id": [3, 4],
}


def pieces_of(config: Mapping[str, Any], dtype: str = "F32") -> list[Piece]:
    """Every tensor of the model, zeros."""
    spec = spec_from_config(Config(config, "config.json"))
    sources = stage_sources(spec, 0, spec.layers, embedding=True, head=True)
    empty = [Piece(s.name, dtype, s.shape, b"") for s in sources]
    return [Piece(p.name, p.dtype, p.shape, bytes(p.bytes)) for p in empty]


def write_model(
    folder: Path, config: Mapping[str, Any], pieces: Sequence[Piece] | None = None
) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", pieces_of(config) if pieces is None else pieces)
    return folder
