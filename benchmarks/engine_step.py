"""A whole training step by our engine in one process; without torch, as on a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quiet import Quiet
from confidantd.config import Split
from confidantd.engine.backends.base import Backend
from confidantd.engine.tensors import Reader, tensor_from_file
from confidantd.engine.train_stage import TrainStage
from confidantd.models.folder import ModelFolder, read_model
from confidantd.models.spec import Form, LoraSpec
from confidantd.wire.stage import StageSpec

ROWS, LENGTH = 4, 128
RATE, MOST_NORM = 2e-5, 1.0
Run = Callable[[], object]


class Forgetful:
    """Remembers no profile: every run measures."""

    def read(self) -> bytes | None:
        """Nothing."""
        return None

    def write(self, data: bytes) -> None:
        """Dropped."""

    def of_head(self) -> Forgetful:
        """The same."""
        return self


def tensors_of(model: ModelFolder) -> Reader:
    """Reads a model's tensors from where they lie."""

    def read(name: str) -> Any:
        at = model.tensors[name]
        return tensor_from_file(at.file, at.offset, at.dtype, at.shape)

    return read


class EngineStep:
    """Forward, backward, clipping and AdamW of one batch of ROWS x LENGTH tokens."""

    def __init__(
        self,
        folder: Path,
        programs: Mapping[str, Path],
        backends: Sequence[Backend],
        *,
        lora: LoraSpec | None = None,
        split: Split = "never",
        form: Form = "saved",
    ) -> None:
        model = read_model(folder)
        spec = StageSpec(
            model.spec, 0, model.spec.layers, True, True, "full" if lora is None else "lora",
            lora, form, ROWS, LENGTH,
        )  # fmt: skip
        read = tensors_of(model)
        self.stage = TrainStage(spec, programs, read, None, len(backends), backends[0])
        if len(backends) > 1:
            self.stage.schedule(backends, Forgetful(), Quiet(), split)
        generator = np.random.default_rng(0)
        self._ids = generator.integers(0, model.spec.vocabulary, (ROWS, LENGTH))

    def run(self) -> None:
        """One step."""
        stage = self.stage
        stage.forward(0, self._ids)
        stage.set_labels(0, self._ids, 1 / (ROWS * (LENGTH - 1)))
        stage.backward(0, None)
        norm = stage.gradient_square_sum() ** 0.5
        stage.step(RATE, min(1.0, MOST_NORM / (norm + 1e-6)))
