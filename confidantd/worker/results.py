"""Files of what a training stage has trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.train_stage import TrainStage
from confidantd.errors import StorageError
from confidantd.models.stage_parts import EMBEDDING, HEAD, Part
from confidantd.wire.worker import Collected, Export, Exported, TrainedTensor
from confidantd.worker.memory import peak_memory_bytes


def write_trained(stage: TrainStage, folder: str) -> Collected:
    """Write every trained tensor into a file of its own."""
    tensors = [
        _written(name, tuple(array.shape), (array,), Path(folder) / f"{index}.f32")
        for index, (name, array) in enumerate(stage.trained())
    ]
    return Collected(tuple(tensors), peak_memory_bytes())


def write_states(stage: TrainStage, command: Export) -> Exported:
    """Write weight and moments of every trained tensor of some parts into a file of its own."""
    parts: set[Part] = set(command.layers)
    parts |= {EMBEDDING} if command.embedding else set()
    parts |= {HEAD} if command.head else set()
    tensors = [
        _written(source.name, (3, arrays[0].size), arrays, Path(command.folder) / f"{index}.state")
        for index, (source, arrays) in enumerate(stage.states(frozenset(parts)))
    ]
    return Exported(tuple(tensors))


def _written(
    name: str, shape: tuple[int, ...], arrays: Sequence[NDArray[np.float32]], path: Path
) -> TrainedTensor:
    """A file of arrays one after the other, float32 in little endian."""
    try:
        with path.open("wb") as file:
            for array in arrays:
                np.ascontiguousarray(array, dtype="<f4").tofile(file)
    except OSError as failure:
        raise StorageError(
            f"cannot write {name} to {path} ({failure.strerror})", "free some disk space"
        ) from None
    assert path.stat().st_size == 4 * math.prod(shape)
    return TrainedTensor(name, shape, str(path))
