"""The same block on a backend, in parts, and in torch: what benchmarks of backends compare."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.engine_step import LENGTH, ROWS, tensors_of
from confidantd.engine.blocks import FusedBlocks, Saved
from confidantd.engine.split.blocks import ATTENTION, SplitBlocks
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.engine.split.profile import Bench
from confidantd.engine.split.team import Team
from confidantd.engine.trained_weights import StageWeights
from confidantd.models.folder import ModelFolder, read_model
from confidantd.models.spec import Form, LoraSpec, Method, ProgramRequest
from confidantd.wire.stage import StageSpec
from tests.programs import programs_for

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = LoraSpec(8, 16.0, ATTENTION_TARGETS)
CONFIGS: Mapping[int, Mapping[str, int]] = {
    128: {"intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    256: {"intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4},
    384: {"intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6},
    768: {"intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12},
    2048: {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
}
Run = Callable[[], object]


def llama_config(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    """The 134M model's shape (768 wide), TinyLlama's (2048 wide), or a smaller one's."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        **CONFIGS[hidden],
    )


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> ModelFolder:
    """A Llama with random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(hidden, layers, vocabulary)).save_pretrained(folder)
    return read_model(folder)


@dataclass(frozen=True)
class BlockCase:
    """One block of a model with its programs and random tokens."""

    bench: Bench
    programs: Mapping[str, Path]
    model: ModelFolder

    @classmethod
    def make(cls, hidden: int, lora: LoraSpec | None = None, form: Form = "saved") -> BlockCase:
        """A block of that width."""
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(Path(folder), hidden, 1, 64)
            method: Method = "full" if lora is None else "lora"
            request = ProgramRequest(model.spec, "train", method, lora, ROWS, LENGTH)
            split = ProgramRequest(model.spec, "train", method, lora, ROWS, LENGTH, split=True)
            programs = programs_for(request) | programs_for(split)
            spec = StageSpec(model.spec, 0, 1, False, False, method, lora, form, ROWS, LENGTH)
            weights = StageWeights(spec, tensors_of(model), None)
            if lora is not None:
                weights.blocks[0].weights.update(
                    {n: np.array(w) for n, w in weights.blocks[0].weights.items()}
                )
        return cls(Bench.of(spec, weights.blocks[0]), programs, model)

    @property
    def groups(self) -> int:
        """Head groups of the block."""
        return self.model.spec.block.kv_heads

    @property
    def columns(self) -> int:
        """MLP columns of the block."""
        return self.model.spec.block.columns

    def split(self, team: Team, placement: Placement) -> SplitBlocks:
        """The block in parts on the team's backends."""
        programs = [team.parts(name) for name in team.names]
        threads = [team.thread(name) for name in team.names]
        spec = self.bench.spec
        return SplitBlocks(
            make_parts(spec.model, spec.lora, programs, threads, placement), team.cpu, _fail
        )

    def fused(self, team: Team, name: str) -> Run:
        """Forward and backward of the whole block on one backend's own thread."""

        @functools.cache
        def make() -> FusedBlocks:  # where it runs, to stay on that core
            programs = team.parts(name)
            return FusedBlocks({n: programs.get(n) for n in FusedBlocks.PROGRAMS})

        thread = team.thread(name)
        return lambda: thread.start(make, self.bench.time).result()[0]

    def whole(self, blocks: SplitBlocks) -> Run:
        """Forward and backward of the block."""
        return lambda: self.bench.time(blocks)

    def attention(self, blocks: SplitBlocks) -> Run:
        """Forward and backward of the attention alone; gives the seconds of both."""
        bench = self.bench

        def run() -> tuple[float, float]:
            started = time.perf_counter()
            _, kept = blocks.unit_forward(ATTENTION, bench.x, bench.block, keep=True)
            between = time.perf_counter()
            saved = Saved({ATTENTION: kept})
            blocks.unit_backward(ATTENTION, bench.dy, bench.x, saved, bench.block)
            ended = time.perf_counter()
            for trained in bench.block.trained.values():
                trained.clear()
            return between - started, ended - between

        return run


def _fail(_name: str, failure: Exception) -> None:
    raise failure


class TorchBlock:
    """The same block by `transformers`, eager, with gradients of all weights or of LoRA's."""

    def __init__(self, hidden: int, *, lora: bool = False) -> None:
        config = llama_config(hidden, 1, 64)
        config._attn_implementation = "sdpa"  # noqa: SLF001 - what from_pretrained would set
        torch.manual_seed(0)
        self._layer: Any = LlamaDecoderLayer(config, 0)
        if lora:
            self._layer = _with_lora(self._layer)
        self._x = torch.randn(ROWS, LENGTH, hidden, requires_grad=True)
        self._dy = torch.randn(ROWS, LENGTH, hidden)
        rotary = LlamaRotaryEmbedding(config)
        self._positions = rotary(self._x, torch.arange(LENGTH)[None])

    def whole(self) -> None:
        """Forward and backward of the block."""
        self._backward(self._layer(self._x, position_embeddings=self._positions))

    def attention(self) -> None:
        """Forward and backward of norm and attention."""
        h = self._layer.input_layernorm(self._x)
        out = self._layer.self_attn(
            hidden_states=h, position_embeddings=self._positions, attention_mask=None
        )
        self._backward(out)

    def _backward(self, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        y.backward(self._dy)
        self._layer.zero_grad()
        self._x.grad = None


def _with_lora(layer: Any) -> Any:
    config = LoraConfig(r=LORA.rank, lora_alpha=16, target_modules=list(LORA.targets))
    return inject_adapter_in_model(config, layer)
