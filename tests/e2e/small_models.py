"""Small models to train and run: random ones at fixed seeds, and the real ones of `../shared`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests import reference

MODEL_NAMES = ("llama", "gpt2", "stories260K", "slm4096-gpt2")
TEXT = Path(__file__).with_name("text.txt")  # written for these tests


@dataclass(frozen=True)
class Small:
    """A model folder, a text that its tokenizer knows, and lengths that suit it."""

    folder: Path
    text: Path
    prompt: str
    length: int
    new_tokens: int
    targets: tuple[str, ...]

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        """Ids with special tokens."""
        return list(self.tokenizer().encode(text).ids)

    def decode(self, prompt: list[int], new: list[int]) -> str:
        """The text that the new tokens add to the prompt's."""
        tokenizer = self.tokenizer()
        whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
        return whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]

    def make_adapter(self, folder: Path) -> Path:
        """A fresh `peft` adapter with random A (seeded) and B zero."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        config = LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            fan_in_fan_out="c_attn" in self.targets,
        )
        get_peft_model(reference.load(self.folder), config).save_pretrained(folder)
        return folder


def make_small(name: str, folder: Path) -> Small:
    """The model of that name; skips where the real ones are not there."""
    if name in ("llama", "llama-untied", "gpt2"):
        return _random(name, folder)
    source = reference.MODELS / name
    if not source.is_dir():
        pytest.skip(f"the real model {name} is not on this machine")
    if name == "stories260K":
        llama = ("q_proj", "k_proj", "v_proj", "o_proj")
        return Small(source, TEXT, "Once upon a time", 64, 64, llama)
    text = folder / "known.txt"
    text.write_text(_known_letters(source, TEXT.read_text()))
    return Small(source, text, text.read_text()[:20], 48, 64, ("c_attn", "attn.c_proj"))


def _known_letters(model: Path, text: str) -> str:
    """The text without the characters that the model's vocabulary lacks."""
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
    return "".join(letter for letter in text if letter in vocabulary)


def _random(name: str, folder: Path) -> Small:
    torch.manual_seed(3)
    model: Any
    if name.startswith("llama"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
                num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
                tie_word_embeddings=name == "llama", initializer_range=0.08, eos_token_id=256,
                bos_token_id=None, rope_parameters={
                    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            )
        )  # fmt: skip
        targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=257, n_embd=48, n_layer=3, n_head=4, n_positions=256,
                initializer_range=0.08, eos_token_id=256, bos_token_id=None,
            )
        )  # fmt: skip
        targets = ("c_attn", "attn.c_proj")
    model.save_pretrained(folder / "model")
    byte_tokenizer(folder / "model")
    return Small(folder / "model", TEXT, "The devices on the shelf", 64, 64, targets)


def byte_tokenizer(folder: Path) -> None:
    """256 bytes and an end-of-text token."""
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def copy_model(source: Path, target: Path) -> Path:
    """A writable copy of a model folder."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    target.chmod(0o755)
    return target
