"""Blocks of small models, fused on the CPU and split over backends, with random gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.blocks import BlockRunner, FusedBlocks
from confidantd.engine.program import load_programs
from confidantd.engine.split.blocks import ATTENTION, MLP, SplitBlocks
from confidantd.engine.split.parts import BackendPrograms, BackendThread
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.engine.train_stage import BLOCK_PROGRAMS
from confidantd.engine.trained_weights import Group, StageWeights
from confidantd.errors import BackendError
from confidantd.models.folder import ModelFolder
from confidantd.models.spec import LoraSpec, Method, ProgramRequest
from confidantd.wire.worker import SplitChosen
from tests.component.engine_models import ROWS, TOKENS, reader, stage_specs
from tests.programs import programs_for

Floats = NDArray[np.float32]


@dataclass
class Heard:
    """Everything that a stage reports, and what it remembers."""

    notices: list[str] = field(default_factory=list)
    chosen_splits: list[SplitChosen] = field(default_factory=list)
    measured: tuple[int, int] = (0, 0)
    kept: bytes | None = None

    def notice(self, code: str, message: str) -> None:
        """What a person is told."""
        self.notices.append(f"{code}: {message}")

    def measuring(self, done: int, of: int) -> None:
        """How far it is."""
        self.measured = (done, of)

    def chosen(self, split: SplitChosen) -> None:
        """In order."""
        self.chosen_splits.append(split)

    def read(self) -> bytes | None:
        """What was written last."""
        return self.kept

    def write(self, data: bytes) -> None:
        """Remember."""
        self.kept = data

    def of_head(self) -> Heard:
        """Another memory."""
        return Heard()

    @property
    def names(self) -> list[list[str]]:
        """Backends of each choice."""
        return [[share.name for share in split.shares] for split in self.chosen_splits]


@dataclass
class BlockRun:
    """One block's output and every gradient by name."""

    y: Floats
    dx: Floats
    gradients: dict[str, Floats]


class SplitModel:
    """A model's first block with its programs; each run starts with empty gradients."""

    def __init__(self, model: ModelFolder, lora: LoraSpec | None = None) -> None:
        self.model, self.lora = model, lora
        method: Method = "full" if lora is None else "lora"
        request = ProgramRequest(model.spec, "train", method, lora, ROWS, TOKENS)
        split = ProgramRequest(model.spec, "train", method, lora, ROWS, TOKENS, split=True)
        self.programs = programs_for(request) | programs_for(split)
        (self.spec,) = stage_specs(model, 1, training=method, lora=lora)
        weights = StageWeights(self.spec, reader(model.tensors), None)
        self.block: Group = weights.blocks[0]
        if lora is not None:  # B is zero in a fresh adapter, which would hide gradients of A
            generator = np.random.default_rng(5)
            for name, trained in self.block.trained.items():
                if name.endswith("lora_b"):
                    trained.weight[...] = generator.normal(0, 0.3, trained.weight.shape)

    def fused(self, backend: Backend | None = None) -> FusedBlocks:
        """The whole block on one backend."""
        return FusedBlocks(load_programs(self.programs, BLOCK_PROGRAMS, 1, backend))

    @contextmanager
    def split(
        self,
        backends: Sequence[Backend],
        groups: Sequence[int],
        columns: Sequence[int],
        failures: list[str] | None = None,
    ) -> Iterator[SplitBlocks]:
        """Parts on backends with so many groups and columns each."""

        def failed(name: str, failure: BackendError) -> None:
            assert failures is not None, failure
            failures.append(f"{name}: {failure.message}")

        made = [BackendPrograms(backend, self.programs, 1) for backend in backends]
        threads = [BackendThread(backend.name) for backend in backends]
        placement = Placement({ATTENTION: tuple(groups), MLP: tuple(columns)})
        parts = make_parts(self.model.spec, self.lora, made, threads, placement)
        fallback = BackendPrograms(CpuBackend(), self.programs, 1)
        blocks = SplitBlocks(parts, fallback, failed)
        try:
            yield blocks
        finally:
            for thread in threads:
                thread.close()

    def run(self, runner: BlockRunner, *, keep: bool = True, microbatches: int = 1) -> BlockRun:
        """Forward and backward of random input; gradients of several microbatches add up."""
        for trained in self.block.trained.values():
            trained.clear()
        generator = np.random.default_rng(3)
        shape = (ROWS, TOKENS, self.model.spec.block.hidden)
        for _ in range(microbatches):
            x = generator.normal(0, 1, shape).astype(np.float32)
            dy = generator.normal(0, 1, shape).astype(np.float32)
            y, saved = runner.forward(x, self.block, keep=keep)
            dx = runner.backward(dy, x, saved, self.block)
        found = {n: t.gradient for n, t in self.block.trained.items()}
        assert all(gradient is not None for gradient in found.values())
        gradients = {name: np.array(g) for name, g in found.items()}
        return BlockRun(np.array(y), np.array(dx), gradients)


def largest_error(found: BlockRun, wanted: BlockRun) -> float:
    """Relative to each tensor's largest element; the largest of output and gradients."""
    pairs = [(found.y, wanted.y), (found.dx, wanted.dx)]
    pairs += [(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def programs_folder(model: SplitModel) -> Path:
    """Where the model's programs lie."""
    return next(iter(model.programs.values())).parent
