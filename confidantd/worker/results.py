"""Files of what a training stage has trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.engine.train_stage import TrainStage
from confidantd.errors import StorageError
from confidantd.models.stage_parts import Part, ordered, stage_parts
from confidantd.store.files import storage_error
from confidantd.wire.worker import (
    STATE_BYTES,
    Collected,
    Export,
    Exported,
    Snapshot,
    Snapshotted,
    StateBlob,
    StateTensor,
    TrainedTensor,
)
from confidantd.worker.memory import peak_memory_bytes

LEAST_BLOB_BYTES = 4_000_000  # a stage's adapter is one blob, each layer of a full model another


def write_trained(stage: TrainStage, folder: str) -> Collected:
    """Write every trained tensor into a file of its own."""
    tensors = [
        _written(name, array, Path(folder) / f"{index}.f32")
        for index, (name, array) in enumerate(stage.trained())
    ]
    return Collected(tuple(tensors), peak_memory_bytes())


def write_states(stage: TrainStage, command: Export) -> Exported:
    """Write weight and moments of every trained tensor of some parts."""
    parts = stage_parts(0, 0, embedding=command.embedding, head=command.head)
    return Exported(_states(stage, parts.union(command.layers), Path(command.folder), "exported"))


def write_snapshot(stage: TrainStage, command: Snapshot) -> Snapshotted:
    """Write weight and moments of everything that is trained here."""
    name = f"after-{command.steps}"
    folder = Path(command.folder)
    try:
        return Snapshotted(command.steps, _states(stage, stage.parts(), folder, name))
    except StorageError:
        for path in folder.glob(f"{name}-*"):  # it would fill the disk for good
            path.unlink(missing_ok=True)
        raise


def _states(
    stage: TrainStage, parts: frozenset[Part], folder: Path, name: str
) -> tuple[StateBlob, ...]:
    """Files of whole parts, so many in one that it is worth the message that asks for it."""
    blobs: list[StateBlob] = []
    waiting: dict[str, tuple[Floats, ...]] = {}
    written: set[str] = set()

    def write() -> None:
        path = folder / f"{name}-{len(blobs)}.state"
        _write(path, [array for arrays in waiting.values() for array in arrays])
        tensors = (StateTensor(n, arrays[0].size) for n, arrays in waiting.items())
        blobs.append(StateBlob(tuple(tensors), str(path)))
        written.update(waiting)
        waiting.clear()

    for part in ordered(parts):
        for source, arrays in stage.states(frozenset({part})):
            if source.name not in written:  # a tied table that is both ends
                waiting[source.name] = arrays
        if STATE_BYTES * sum(arrays[0].size for arrays in waiting.values()) >= LEAST_BLOB_BYTES:
            write()
    if waiting:
        write()
    return tuple(blobs)


def _written(name: str, array: Floats, path: Path) -> TrainedTensor:
    _write(path, (array,))
    assert path.stat().st_size == 4 * array.size
    return TrainedTensor(name, tuple(array.shape), str(path))


def _write(path: Path, arrays: Sequence[Floats]) -> None:
    """A file of arrays one after the other, float32 in little endian."""
    try:
        with path.open("wb") as file:
            for array in arrays:
                file.write(np.ascontiguousarray(array, dtype="<f4").data.cast("B"))
    except OSError as failure:
        path.unlink(missing_ok=True)
        raise storage_error(path, failure) from None
