"""Small model folders with tokenizers of several kinds, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from tests.unit.model_files import LLAMA, write_model

TEXT = "The cat sat on the mat. Naïve café: 你好 🙂 — the end of the cat.\n" * 20
END = "<end>"
VOCABULARY = 300


def byte_model(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A model folder with a byte-level BPE tokenizer.json whose end-of-text token is `<end>`."""
    write_model(folder, {**LLAMA, "vocab_size": vocabulary})
    _trained([END]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def gpt2_model(folder: Path) -> Path:
    """The same kind of tokenizer as GPT-2's two files, without any settings file."""
    write_model(folder, {**LLAMA, "vocab_size": VOCABULARY})
    _trained(["<|endoftext|>"]).save_model(str(folder))
    return folder


def change_tokenizer(folder: Path, **changes: object) -> None:
    """Set top-level keys of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reference(folder: Path) -> Tokenizer:
    """The tokenizer as `transformers` loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _trained(special: list[str]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [TEXT], vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    return tokenizer
