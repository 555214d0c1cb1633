"""Reads the tensors of an assignment from the blobs its daemon fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from confidantd.engine.generation.weights import AnyReader
from confidantd.engine.quantised import Quantised, quantised_from_file
from confidantd.engine.tensors import Array, Reader, tensor_from_file
from confidantd.errors import MissingTensorError
from confidantd.ids import Digest
from confidantd.models.block_format import BlockFormat
from confidantd.wire.stage import ProgramEntry, StateEntry, TensorEntry
from confidantd.wire.worker import BlobRange

Entries = tuple[TensorEntry, ...]
Blobs = Mapping[Digest, BlobRange]


def reader(entries: Entries, blobs: Blobs) -> Reader:
    """A function from a tensor's name to its array (memory-mapped, read-only)."""
    place = _places(entries, blobs)

    def read(name: str) -> Array:
        entry, path, offset = place(name)
        return tensor_from_file(path, offset, entry.dtype, entry.shape)

    return read


def any_reader(entries: Entries, blobs: Blobs) -> AnyReader:
    """As `reader`, of tensors that may be quantised."""
    place = _places(entries, blobs)

    def read(name: str) -> Array | Quantised:
        entry, path, offset = place(name)
        form = BlockFormat.parse(entry.dtype)
        if form is None:
            return tensor_from_file(path, offset, entry.dtype, entry.shape)
        return quantised_from_file(path, offset, form, entry.shape)

    return read


def _places(entries: Entries, blobs: Blobs) -> Callable[[str], tuple[TensorEntry, Path, int]]:
    by_name = {entry.name: entry for entry in entries}

    def place(name: str) -> tuple[TensorEntry, Path, int]:
        entry = by_name.get(name)
        if entry is None or entry.digest not in blobs:
            raise MissingTensorError(f"this stage was not given the tensor {name}")
        blob = blobs[entry.digest]
        return entry, Path(blob.path), blob.offset

    return place


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
