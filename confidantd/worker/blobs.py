"""Reads the tensors of an assignment from the blobs its daemon fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from confidantd.engine.generation.weights import AnyReader
from confidantd.engine.gguf_matrix import gguf_matrix, matrix_room
from confidantd.engine.quantised import Quantised, quantised_from_file
from confidantd.engine.scratch import Scratch
from confidantd.engine.tensors import Array, Reader, tensor_from_file
from confidantd.errors import MissingTensorError
from confidantd.ids import Digest
from confidantd.models.block_format import BlockFormat
from confidantd.models.gguf_format import GgufFormat
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


def any_reader(entries: Entries, blobs: Blobs, scratch: Scratch) -> AnyReader:
    """As `reader`, of tensors that may be quantised; those of GGUF files need `scratch_bytes`."""
    place = _places(entries, blobs)

    def read(name: str) -> Array | Quantised:
        entry, path, offset = place(name)
        form, packed = GgufFormat.parse(entry.dtype), BlockFormat.parse(entry.dtype)
        if form is not None and form.type.packed is not None:
            return gguf_matrix(path, offset, form, entry.shape, scratch)
        if packed is not None:
            return quantised_from_file(path, offset, packed, entry.shape)
        return tensor_from_file(path, offset, entry.dtype, entry.shape)

    return read


def scratch_bytes(entries: Entries) -> int:
    """What reading all of them takes of a scratch file."""
    forms = ((GgufFormat.parse(entry.dtype), entry.shape) for entry in entries)
    return sum(matrix_room(form, shape) for form, shape in forms if form is not None)


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
