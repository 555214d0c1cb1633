"""Training jobs over real daemons on loopback, for what their workers took of memory."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.devices import Device, running

NAMES = ("anna", "ben", "cleo", "dora")
STEPS = 3  # what grows has grown after two


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batch it is trained with."""

    hidden: int
    layers: int
    heads: int
    columns: int
    vocabulary: int
    batch: int = 8
    microbatches: int = 4
    length: int = 128
    tied: bool = False

    def config(self) -> LlamaConfig:
        """As many key-value heads as heads."""
        return LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads,
            intermediate_size=self.columns, vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip


LLAMA_134M = Shape(768, 12, 12, 2048, 32_000)
SMALL = Shape(384, 6, 6, 1024, 32_000)


@dataclass(frozen=True)
class Stage:
    """What one worker took, and what the plan said; a device may have two."""

    device: str
    layers: int
    form: str
    peak_bytes: int
    predicted_bytes: int

    @property
    def miss(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_bytes / self.peak_bytes - 1


class NoPlanError(Exception):
    """The plan says so."""


class Trainings:
    """A model, a text of random words, and folders for devices; programs are compiled once a
    method and kept with the first device.
    """

    def __init__(self, shape: Shape, folder: Path) -> None:
        self._shape, self._folder = shape, folder
        self._runs = 0
        self.model = folder / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(shape.config()).save_pretrained(self.model)
        words = {f"w{i}": i for i in range(shape.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106 - a word
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(self.model / "tokenizer.json"))
        draw = random.Random(0)  # noqa: S311 - any words do
        count = STEPS * shape.batch * shape.length + 1
        self._text = folder / "words.txt"
        self._text.write_text(" ".join(f"w{draw.randrange(len(words))}" for _ in range(count)))

    @property
    def sequences(self) -> tuple[int, int, int]:
        """Batch, microbatches and tokens of a sequence."""
        return self._shape.batch, self._shape.microbatches, self._shape.length

    def run(self, method: str, count: int, cap_bytes: int | None = None) -> list[Stage]:
        """Some steps over `count` devices, each with so much memory for jobs."""
        caps = [] if cap_bytes is None else ["--memory", str(cap_bytes)]
        self._runs += 1
        devices = [
            Device(self._folder / f"{name}{'' if name == NAMES[0] else self._runs}", name, *caps)
            for name in NAMES[:count]
        ]
        with running(devices):
            return self._train(devices, method)

    def _train(self, devices: Sequence[Device], method: str) -> list[Stage]:
        shape, output = self._shape, self._folder / f"output{self._runs}"
        events = devices[0].events(
            "train", str(self.model), "--data", str(self._text), "--output", str(output),
            "--steps", str(STEPS), "--batch-size", str(shape.batch),
            "--sequence-length", str(shape.length), "--method", method, "--no-shuffle",
            *(("--microbatches", str(shape.microbatches)) if len(devices) == 1 else ()),
            "--devices", ",".join(device.name for device in devices),
        )  # fmt: skip
        if events[-1].get("error", events[-1]).get("code") == "does-not-fit":
            raise NoPlanError(json.dumps(events[-1]))
        if events[-1].get("event") != "done":
            raise RuntimeError(json.dumps(events[-1]))
        (plan,) = (event for event in events if event["event"] == "plan")
        return [_stage(*both) for both in zip(plan["stages"], events[-1]["stages"], strict=True)]


def _stage(planned: dict[str, Any], done: dict[str, Any]) -> Stage:
    first, past_last = planned["layers"]
    return Stage(
        done["name"],
        past_last - first,
        planned["form"],
        done["peak_memory_bytes"],
        planned["memory_bytes"],
    )
