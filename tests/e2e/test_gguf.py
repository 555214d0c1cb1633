"""A model that is one GGUF file: the owner reads it once, others fetch ranges of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests import reference
from tests.e2e.devices import Device, swarm
from tests.gguf_files import describe_tokenizer, write_gguf

NAMES = ("anna", "ben")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    with swarm(tmp_path_factory.mktemp("gguf"), len(NAMES)) as found:
        yield found


class Made:
    """A GGUF file, what its weights are worth in `transformers`, and its tokenizer."""

    def __init__(self, source: Path, folder: Path, kind: str, pre: str, **fields: Any) -> None:
        loaded: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.model = loaded.eval()
        text = (source / "tokenizer.json").read_text()
        self.tokenizer = Tokenizer.from_str(text)
        describe = describe_tokenizer(json.loads(text), pre=pre, **fields)
        self.file = write_gguf(
            folder / f"{source.name}-{kind}.gguf", loaded, lambda _: kind, describe, made_up=False
        )

    def reference(self, prompt: str) -> list[int]:
        """Greedy tokens of `transformers`."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in found[0, ids.shape[1] :]]


def stories(folder: Path, kind: str) -> Made:
    """A real model, with a tokenizer of SentencePiece's kind."""
    source = reference.MODELS / "stories260K"
    if not source.is_dir():
        pytest.skip("the real model stories260K is not on this machine")
    return Made(source, folder, kind, "", bos_token_id=1, eos_token_id=1, unknown_token_id=0)


def generate(device: Device, file: Path, prompt: str, *options: str) -> dict[str, Any]:
    """The answer."""
    return device.json(
        "generate", str(file), "--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS), *options
    )


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_one_device_and_two_say_what_transformers_says(
    devices: list[Device], tmp_path: Path, kind: str
) -> None:
    """A real model: the tokens are those of the weights in the file."""
    made, prompt = stories(tmp_path, kind), "Once upon a time"
    wanted = made.reference(prompt)
    alone = generate(devices[0], made.file, prompt, "--devices", "anna")
    assert alone["tokens"] == wanted
    both = generate(devices[0], made.file, prompt, "--devices", "anna,ben")
    assert both["tokens"] == wanted
    assert len(both["stages"]) == len(NAMES)
    assert alone["text"].startswith(", there was a little girl named Lily")
