"""Matrices of GGUF files as ONNX Runtime multiplies by them: the same numbers in another order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from confidantd.engine.gguf_blocks import Blocks, blocks_of, plain_rows
from confidantd.engine.quantised import Quantised, packed_numbers, row_ranges
from confidantd.engine.scratch import Scratch
from confidantd.engine.tensors import Floats, forget_pages, raw_blocks
from confidantd.errors import ModelError
from confidantd.models.block_format import BlockFormat
from confidantd.models.gguf_format import GgufFormat


def matrix_room(form: GgufFormat, shape: tuple[int, ...]) -> int:
    """What `gguf_matrix` takes of the scratch file."""
    packed = form.type.packed
    if packed is None or not form.fits(shape):
        return 0
    numbers = packed.packed_shape((shape[0], shape[1]))
    blocks = Scratch.room(4 * numbers[0] * numbers[1])
    whole = Scratch.room(numbers[0] * numbers[1] * numbers[2])
    return whole + blocks * (2 if packed.offsets else 1)


def gguf_matrix(
    path: Path, offset: int, form: GgufFormat, shape: tuple[int, ...], scratch: Scratch
) -> Quantised:
    """The matrix [out, in] at `offset` of a file, in a scratch file; no number is rounded, but
    for the offsets of blocks.
    """
    raw, packed = raw_blocks(path, offset, form, shape), form.type.packed
    if packed is None:
        raise ModelError(f"{path}: a tensor of type {form.type.name} is not quantised")
    rows, width = shape
    blocks = packed.packed_shape((rows, width))
    numbers = scratch.region(blocks, np.uint8)
    scales = scratch.region(blocks[:2], np.float32)
    offsets = scratch.region(blocks[:2], np.float32) if packed.offsets else None
    order = plain_rows(np.arange(rows), form.heads) if form.heads else None
    for some in row_ranges(rows, width):
        found = blocks_of(form.type.name, raw[some if order is None else order[some]])
        numbers.write(some.start, _packed(found, packed))
        scales.write(some.start, found.scales)
        if offsets is not None:
            offsets.write(some.start, _offsets(found))
        forget_pages(raw)
    return Quantised(
        packed,
        (rows, width),
        numbers.array,
        scales.array,
        None if offsets is None else offsets.array,
    )


def _packed(found: Blocks, form: BlockFormat) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """From 0 up: a byte that overflows is right again."""
    whole = found.numbers.view(np.uint8) + np.uint8((1 << (form.bits - 1)) - found.middle)
    return packed_numbers(whole, form)


def _offsets(found: Blocks) -> Floats:
    """What is added to scale * (number - middle)."""
    assert found.minima is not None
    return found.minima + np.float32(found.middle) * found.scales
