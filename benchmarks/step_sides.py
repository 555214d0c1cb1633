"""A whole training step of a Llama by torch, and by our engine with programs made for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.block_sides import LORA, llama_config, make_model
from benchmarks.engine_step import LENGTH, MOST_NORM, RATE, ROWS, EngineStep
from confidantd.config import Split
from confidantd.engine.backends.base import Backend
from confidantd.models.folder import ModelFolder
from confidantd.models.spec import Form, LoraSpec, Method, ProgramRequest
from tests.programs import programs_for


def engine_step(
    model: ModelFolder,
    backends: Sequence[Backend],
    *,
    lora: LoraSpec | None = None,
    split: Split = "never",
    form: Form = "saved",
) -> EngineStep:
    """Our step over backends, one thread each."""
    programs = step_programs(model, lora)
    return EngineStep(model.path, programs, backends, lora=lora, split=split, form=form)


def step_programs(model: ModelFolder, lora: LoraSpec | None) -> dict[str, Path]:
    """Programs of whole blocks and of parts."""
    method: Method = "full" if lora is None else "lora"
    request = ProgramRequest(model.spec, "train", method, lora, ROWS, LENGTH)
    return {**programs_for(request), **programs_for(replace(request, split=True))}


class TorchStep:
    """The same by torch and `transformers`, and `peft` for LoRA."""

    def __init__(self, hidden: int, layers: int, vocabulary: int, *, lora: bool) -> None:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(llama_config(hidden, layers, vocabulary))
        if lora:
            config = LoraConfig(r=LORA.rank, lora_alpha=16, target_modules=list(LORA.targets))
            model = get_peft_model(model, config)
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=RATE, weight_decay=0.0)
        self._ids = torch.randint(0, vocabulary, (ROWS, LENGTH))

    def run(self) -> None:
        """One step."""
        loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, MOST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()


@contextmanager
def step_model(hidden: int, layers: int, vocabulary: int) -> Iterator[ModelFolder]:
    """A model in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_model(Path(folder), hidden, layers, vocabulary)
