"""Small random models in folders, cut into stages that a plain loop drives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from confidantd.engine.generation.stage import FusedStage, GeneratingStage
from confidantd.engine.tensors import Reader, tensor_from_file
from confidantd.engine.train_stage import TrainStage
from confidantd.models.folder import ModelFolder, read_model
from confidantd.models.safetensors import TensorLocation
from confidantd.models.spec import LoraSpec, Method, ProgramRequest
from confidantd.wire.stage import OptimizerSpec, StageSpec
from tests.programs import programs_for

ROWS, TOKENS = 2, 12
disable_progress_bar()  # it starts a thread that outlives its test
SHARED_MODELS = Path(__file__).parents[3] / "shared" / "models"

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-tied": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": _LLAMA3,
        "head_dim": 10,
    },
    "llama-16": {"head_dim": 16, "tie_word_embeddings": True},
    "llama-24": {"head_dim": 24, "rope_parameters": _LLAMA3},
    "gpt2": {"tie_word_embeddings": True},
    "gpt2-untied": {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40},
}


def make_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random `transformers` model; all biases and norms are random too."""
    torch.manual_seed(seed)
    common = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, **_CONFIGS[kind]}
    model: torch.nn.Module
    if kind.startswith("llama"):
        sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **common))
    else:
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.15)
    return model.eval()


def save_model(kind: str, folder: Path, seed: int = 0) -> ModelFolder:
    """The model of `make_model` as a folder, read back."""
    make_model(kind, seed).save_pretrained(folder)
    return read_model(folder)


def reader(tensors: Mapping[str, TensorLocation]) -> Reader:
    """Reads tensors from where they lie."""

    def read(name: str) -> NDArray[Any]:
        at = tensors[name]
        return tensor_from_file(at.file, at.offset, at.dtype, at.shape)

    return read


def stage_specs(model: ModelFolder, stages: int, **fields: Any) -> list[StageSpec]:
    """The model's layers over `stages` stages, the first ones getting more."""
    layers = model.spec.layers
    ends = [layers - (layers * (stages - i)) // stages for i in range(stages + 1)]
    return [
        StageSpec(
            model.spec,
            ends[i],
            ends[i + 1],
            embedding=i == 0,
            head=i == stages - 1,
            microbatch_size=ROWS,
            sequence_length=TOKENS,
            **fields,
        )
        for i in range(stages)
    ]


@dataclass
class Adapter:
    """An adapter to start from, or to merge."""

    lora: LoraSpec
    tensors: Mapping[str, TensorLocation] | None = None

    def reader(self) -> Reader | None:
        """None for a fresh adapter."""
        return None if self.tensors is None else reader(self.tensors)


@dataclass
class Pipeline:
    """Training stages in one process."""

    stages: Sequence[TrainStage]
    norms: list[float] = field(default_factory=list)

    def gradients(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """Forward and backward of microbatches [M, B, S]; gives the loss."""
        head = self.stages[-1]
        scale = 1 / (labels[:, :, 1:] != -100).sum()
        for index in range(len(ids)):
            x: Any = ids[index]
            for stage in self.stages:
                x = stage.forward(index, x)
        for index in range(len(ids)):
            head.set_labels(index, labels[index], float(scale))
            dy = None
            for stage in reversed(self.stages):
                dy = stage.backward(index, dy)
        first, last = self.stages[0].tied_gradient(), head.tied_gradient()
        if first is not None and last is not None:
            first, last = first.copy(), last.copy()
            self.stages[0].add_tied_gradient(last)
            head.add_tied_gradient(first)
        return head.loss()

    def step(self, ids: NDArray[Any], labels: NDArray[Any], rate: float, most: float) -> float:
        """One optimizer step with the global norm clipped at `most`; gives the loss."""
        loss = self.gradients(ids, labels)
        norm = sum(stage.gradient_square_sum() for stage in self.stages) ** 0.5
        self.norms.append(norm)
        for stage in self.stages:
            stage.step(rate, min(1.0, most / (norm + 1e-6)))
        return loss

    def trained(self) -> dict[str, NDArray[np.float32]]:
        """All results; no name may come twice."""
        found: dict[str, NDArray[np.float32]] = {}
        for stage in self.stages:
            for name, array in stage.trained():
                assert name not in found
                found[name] = array
        return found


def training_pipeline(
    model: ModelFolder,
    stages: int,
    *,
    adapter: Adapter | None = None,
    optimizer: OptimizerSpec | None = None,
    seed: int = 0,
) -> Pipeline:
    """Training stages of a model, full or with an adapter."""
    method: Method = "full" if adapter is None else "lora"
    lora = None if adapter is None else adapter.lora
    programs = programs_for(ProgramRequest(model.spec, "train", method, lora, ROWS, TOKENS))
    optimizer = optimizer or OptimizerSpec()
    specs = stage_specs(model, stages, training=method, lora=lora, optimizer=optimizer, seed=seed)
    read_adapter = None if adapter is None else adapter.reader()
    read = reader(model.tensors)
    return Pipeline([TrainStage(spec, programs, read, read_adapter, 1) for spec in specs])


@dataclass
class Decoder:
    """Generating stages in one process."""

    stages: Sequence[GeneratingStage]

    def logits(self, ids: Sequence[int], sequence: int = 0) -> NDArray[np.float32]:
        """Logits [V] after `ids`, which continue the sequence."""
        return self.batch(np.array([ids], np.int64), [sequence])[0]

    def batch(self, ids: NDArray[Any], sequences: Sequence[int]) -> NDArray[np.float32]:
        """Logits [b, V] after `ids` [b, T], which continue the sequences."""
        x = ids
        for stage in self.stages:
            x = stage.forward(sequences, x)
        return x[:, -1]

    def greedy(self, prompt: Sequence[int], count: int, sequence: int = 0) -> list[int]:
        """`count` most likely tokens after a prompt."""
        found = [int(self.logits(prompt, sequence).argmax())]
        while len(found) < count:
            found.append(int(self.logits(found[-1:], sequence).argmax()))
        return found


def decoder(model: ModelFolder, stages: int, adapter: Adapter | None = None) -> Decoder:
    """Generating stages of a model, with an adapter merged if given."""
    lora = None if adapter is None else adapter.lora
    read_adapter = None if adapter is None else adapter.reader()
    specs = stage_specs(model, stages, training=None, lora=lora)
    read = reader(model.tensors)
    return Decoder([FusedStage(spec, read, read_adapter, 1) for spec in specs])


def random_ids(seed: int, *shape: int, vocabulary: int = 61) -> NDArray[np.int64]:
    """Token ids."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape)
