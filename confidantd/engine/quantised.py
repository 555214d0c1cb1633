"""Weights in blocks of 4 or 8 bits, as ONNX Runtime's `MatMulNBits` takes them.

A row [in] of a matrix [out, in] is cut into blocks; each has a scale, and each weight is its
scale times a whole number from -8 to 7 (4 bits) or -127 to 127 (8 bits), stored with 8 or 128
added. Two numbers of 4 bits share a byte, the first in its lower half. In some formats each block
has an offset that is added to its weights; `MatMulNBits` does not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.tensors import Floats
from confidantd.errors import CorruptFileError, ModelError
from confidantd.models.block_format import BlockFormat

_SOME_WEIGHTS = 1 << 20  # are quantised at once
_SOME_BYTES = (1 << 16) + 1  # random ones, repeated
# Of the largest number of a block: what the scale may be less than it needs, in 4 bits. The
# largest weight is then cut off a little, and the others are nearer.
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [out, in]: `numbers` as bytes [out, blocks, ...], `scales` and `offsets`
    [out, blocks].
    """

    format: BlockFormat
    shape: tuple[int, int]
    numbers: NDArray[np.uint8]
    scales: NDArray[np.float16] | Floats
    offsets: Floats | None = None

    @classmethod
    def of_bytes(cls, form: BlockFormat, shape: tuple[int, int], data: NDArray[np.uint8]) -> Self:
        """From what `to_bytes` gave; its memory is used as it lies."""
        packed = form.packed_shape(shape)
        numbers, scales = data[: math.prod(packed)], data[math.prod(packed) :]
        return cls(
            form, shape, numbers.reshape(packed), scales.view(np.float16).reshape(packed[:2])
        )

    def to_bytes(self) -> bytes:
        """Numbers, then scales."""
        return self.numbers.tobytes() + self.scales.tobytes()

    def values(self) -> Floats:
        """The weights [out, in]."""
        numbers = self.numbers
        if self.format.bits == 4:
            halves = np.stack([numbers & 15, numbers >> 4], axis=-1)
            numbers = halves.reshape(*numbers.shape[:2], self.format.block)
        middle = 1 << (self.format.bits - 1)
        found = (numbers.astype(np.float32) - middle) * self.scales[..., None].astype(np.float32)
        if self.offsets is not None:
            found += self.offsets[..., None]
        return found.reshape(self.shape[0], -1)[:, : self.shape[1]]


def quantised_from_file(
    path: Path, offset: int, form: BlockFormat, shape: tuple[int, ...]
) -> Quantised:
    """What `to_bytes` wrote at `offset` of a file; a read-only memory map."""
    if len(shape) != 2 or min(shape) < 1 or form.offsets:
        raise ModelError(f"{path}: a quantised tensor must be a matrix without offsets")
    sides = (shape[0], shape[1])
    try:
        if path.stat().st_size < offset + form.size(sides):
            raise CorruptFileError(f"{path} is shorter than its tensor")
        data = np.memmap(path, np.uint8, mode="r", offset=offset, shape=(form.size(sides),))
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None
    return Quantised.of_bytes(form, sides, data)


def any_quantised(form: BlockFormat, shape: tuple[int, int], name: str) -> Quantised:
    """Some matrix, made at once: all weights are small and none is the same as the next, nor are
    two matrices of different names, which ONNX Runtime would keep only once.
    """
    packed = form.packed_shape(shape)
    some = np.random.default_rng(list(name.encode())).integers(0, 256, _SOME_BYTES, np.uint8)
    offsets = np.full(packed[:2], 1e-4, np.float32) if form.offsets else None
    scales = np.full(packed[:2], 1e-4, np.float16)
    return Quantised(form, shape, np.resize(some, packed), scales, offsets)


def quantise(matrix: NDArray[Any], form: BlockFormat) -> Quantised:
    """The nearest matrix of this format to one [out, in]; ValueError if it has a number that is
    not finite, or too large for the format.
    """
    rows, width = matrix.shape
    packed = form.packed_shape((rows, width))
    numbers, scales = np.empty(packed, np.uint8), np.empty(packed[:2], np.float16)
    for some in row_ranges(rows, width):
        part = np.zeros((some.stop - some.start, packed[1] * form.block), np.float32)
        part[:, :width] = matrix[some]
        blocks = part.reshape(part.shape[0], packed[1], form.block)
        whole, scales[some] = _eight(blocks) if form.bits == 8 else _four(blocks)
        if not np.isfinite(scales[some]).all():
            raise ValueError("a number is not finite, or too large")
        numbers[some] = packed_numbers(whole, form)
    return Quantised(form, (rows, width), numbers, scales)


def packed_numbers(whole: NDArray[np.uint8], form: BlockFormat) -> NDArray[np.uint8]:
    """Numbers [..., block] from 0 up as bytes."""
    return whole if form.bits == 8 else whole[..., 0::2] | whole[..., 1::2] << np.uint8(4)


def row_ranges(rows: int, width: int) -> Iterator[slice]:
    """Of as many weights as are worked on at once."""
    step = max(1, _SOME_WEIGHTS // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _eight(blocks: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
    return _whole(blocks, scales, -127, 127), scales


def _four(blocks: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """The weight farthest from 0 becomes -8, or a little over it: what is nearest in squares."""
    at = np.abs(blocks).argmax(-1)[..., None]
    full = np.take_along_axis(blocks, at, -1)[..., 0] / -8
    best, best_error = None, None
    for shrink in _SHRINKS:
        scales = (full * np.float32(shrink)).astype(np.float16)
        whole = _whole(blocks, scales, -8, 7)
        back = (whole.astype(np.float32) - 8) * scales[..., None].astype(np.float32)
        error = np.square(back - blocks).sum(-1)
        if best is None or best_error is None:
            best, best_error = (whole, scales), error
            continue
        better = error < best_error
        best = (
            np.where(better[..., None], whole, best[0]),
            np.where(better, scales, best[1]),
        )
        best_error = np.minimum(error, best_error)
    assert best is not None
    return best


def _whole(blocks: Floats, scales: NDArray[np.float16], least: int, most: int) -> NDArray[np.uint8]:
    """The numbers nearest to blocks / scales, from 0 up."""
    wide = scales.astype(np.float32)
    inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)
    found = np.clip(np.rint(blocks * inverse[..., None]), least, most)
    return (found + (8 if most == 7 else 128)).astype(np.uint8)
