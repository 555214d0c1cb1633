"""Reads the tensors of an assignment from the blobs its daemon fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from confidantd.engine.tensors import tensor_from_file
from confidantd.errors import MissingTensorError
from confidantd.ids import Digest
from confidantd.wire.stage import ProgramEntry, StateEntry, TensorEntry
from confidantd.wire.worker import BlobRange

Reader = Callable[[str], NDArray[Any]]


def reader(entries: tuple[TensorEntry, ...], blobs: Mapping[Digest, BlobRange]) -> Reader:
    """A function from a tensor's name to its array (memory-mapped, read-only)."""
    by_name = {entry.name: entry for entry in entries}

    def read(name: str) -> NDArray[Any]:
        entry = by_name.get(name)
        if entry is None or entry.digest not in blobs:
            raise MissingTensorError(f"this stage was not given the tensor {name}")
        blob = blobs[entry.digest]
        return tensor_from_file(Path(blob.path), blob.offset, entry.dtype, entry.shape)

    return read


def state_reader(
    entries: tuple[StateEntry, ...], blobs: Mapping[Digest, BlobRange]
) -> Callable[[str], NDArray[Any] | None]:
    """A function from a tensor's name to weight and moments [3, size]; None if there are none."""
    by_name = {entry.name: entry for entry in entries}

    def read(name: str) -> NDArray[Any] | None:
        entry = by_name.get(name)
        if entry is None:
            return None
        blob = blobs[entry.digest]
        return tensor_from_file(Path(blob.path), blob.offset + entry.offset, "F32", (3, entry.size))

    return read


def program_paths(
    programs: Mapping[str, ProgramEntry], blobs: Mapping[Digest, BlobRange]
) -> dict[str, Path]:
    """Program names to their files."""
    return {name: Path(blobs[entry.digest].path) for name, entry in programs.items()}
