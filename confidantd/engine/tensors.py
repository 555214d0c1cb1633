"""Checkpoint tensors as numpy arrays, without a safetensors library."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.gguf_blocks import blocks_of, plain_rows
from confidantd.errors import CorruptFileError, ModelError
from confidantd.models.gguf_format import GgufFormat
from confidantd.models.tensors import Source

Array = NDArray[Any]
Floats = NDArray[np.float32]
Reader = Callable[[str], NDArray[Any]]  # the tensor of a Hugging Face (or peft) name

_SOME_ROWS = 64  # are converted at once
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def tensor_from_file(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The tensor at `offset` of a file; a read-only memory map, except that BF16, which
    numpy lacks, and what GGUF files have, are converted to float32.
    """
    form = GgufFormat.parse(dtype)
    if form is not None:
        return _gguf_values(path, offset, form, shape)
    if dtype not in _DTYPES:
        raise ModelError(f"{path}: dtype {dtype:.20} cannot be computed with")
    stored = np.dtype(_DTYPES[dtype])
    try:
        if path.stat().st_size < offset + math.prod(shape) * stored.itemsize:
            raise CorruptFileError(f"{path} is shorter than its tensor")
        if math.prod(shape) == 0:
            return np.zeros(shape, np.float32)
        mapped = np.memmap(path, stored, mode="r", offset=offset, shape=shape)
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None
    return _widened(mapped) if dtype == "BF16" else mapped


def _gguf_values(path: Path, offset: int, form: GgufFormat, shape: tuple[int, ...]) -> Array:
    if form.type.block == 1:
        found = tensor_from_file(path, offset, form.type.name, shape)
        return plain_rows(found, form.heads) if form.fits(shape) else found
    raw = raw_blocks(path, offset, form, shape)
    found = np.empty(shape, np.float32)
    for start in range(0, len(raw), _SOME_ROWS):
        found[start : start + _SOME_ROWS] = blocks_of(
            form.type.name, raw[start : start + _SOME_ROWS]
        ).values()
    forget_pages(raw)
    return plain_rows(found, form.heads) if form.heads else found


def raw_blocks(
    path: Path, offset: int, form: GgufFormat, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """The blocks of a quantised matrix of a GGUF file as they lie there, [rows, blocks, bytes]; a
    read-only memory map.
    """
    kind = form.type
    if len(shape) != 2 or not form.fits(shape):
        raise ModelError(f"{path}: a tensor of type {kind.name} cannot have shape {list(shape)}")
    try:
        if path.stat().st_size < offset + kind.size(shape):
            raise CorruptFileError(f"{path} is shorter than its tensor")
        blocks = (shape[0], shape[1] // kind.block, kind.bytes)
        return np.memmap(path, np.uint8, mode="r", offset=offset, shape=blocks)
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None


def _widened(mapped: Array) -> Floats:
    """Numbers of 16 bits, the upper half of float32's, as float32: one array, and no other."""
    found = np.empty(mapped.shape, np.float32)
    bits = found.view(np.uint32)
    np.left_shift(mapped, np.uint32(16), out=bits, dtype=np.uint32, casting="unsafe")
    forget_pages(mapped)
    return found


def forget_pages(array: Array) -> None:
    """Let go of the memory of a file's map; what is read again comes from the file again."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def floats(array: Array) -> Floats:
    """As float32 in C order: the array itself where it is that."""
    found = np.require(array, np.float32, ("C", "ALIGNED"))
    if found is not array:
        forget_pages(array)
    return found


def stored(source: Source, read: Callable[[str], Any]) -> Array:
    """A parameter as it lies in its checkpoint."""
    array = read(source.name)
    if not isinstance(array, np.ndarray):
        raise ModelError(f"{source.name} is quantised, which only generation can use")
    if array.shape != source.shape:
        raise ModelError(f"{source.name} has shape {array.shape}, expected {source.shape}")
    return array


def load(source: Source, read: Reader, *, writable: bool) -> Floats:
    """A parameter in its program's layout: float32, C order.

    One that is not written to stays a memory map of its file where that has this layout.
    """
    found = stored(source, read)
    turned = found.T if source.transposed else found
    if writable:
        return np.array(turned, dtype=np.float32, order="C")
    return np.require(turned, np.float32, ("C", "ALIGNED"))
