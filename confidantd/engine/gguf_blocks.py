"""The numbers in GGUF's blocks, as the format defines them.

A weight is scale * number, plus the block's minimum in types that have one. `numbers` are whole,
[rows, blocks, block] as int8; `scales` and `minima` [rows, blocks] in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a quantised matrix. `middle`: of the numbers of types with minima, which begin at 0.

    Products are exacter with numbers around 0: those with large ones would cancel each other.
    """

    numbers: NDArray[np.int8]
    scales: Floats
    minima: Floats | None = None
    middle: int = 0

    def values(self) -> Floats:
        """The weights [rows, width]."""
        found = self.scales[..., None] * self.numbers.astype(np.float32)
        if self.minima is not None:
            found += self.minima[..., None]
        return found.reshape(len(found), -1)


def blocks_of(kind: str, raw: Bytes) -> Blocks:
    """Of blocks as they lie in a file, [rows, blocks, bytes]."""
    return _READERS[kind](raw)


def _half(raw: Bytes, start: int) -> Floats:
    """The float16 that begins at a byte of each block."""
    return np.ascontiguousarray(raw[..., start : start + 2]).view("<f2")[..., 0].astype(np.float32)


def _nibbles(raw: Bytes) -> NDArray[np.int8]:
    """Lower halves of all bytes, then upper ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.int8)


def _fifth_bits(raw: Bytes) -> NDArray[np.int8]:
    """Of four bytes, a bit for each of 32 weights, as 0 or 16."""
    bits = np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little")
    return bits.astype(np.int8) << 4


def _q8_0(raw: Bytes) -> Blocks:
    numbers = np.ascontiguousarray(raw[..., 2:]).view(np.int8)
    return Blocks(numbers, _half(raw, 0))


def _q4_0(raw: Bytes) -> Blocks:
    return Blocks(_nibbles(raw[..., 2:]) - np.int8(8), _half(raw, 0))


def _q4_1(raw: Bytes) -> Blocks:
    return Blocks(_nibbles(raw[..., 4:]), _half(raw, 0), _half(raw, 2), 8)


def _q5_0(raw: Bytes) -> Blocks:
    numbers = _nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6])
    return Blocks(numbers - np.int8(16), _half(raw, 0))


def _q5_1(raw: Bytes) -> Blocks:
    numbers = _nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8])
    return Blocks(numbers, _half(raw, 0), _half(raw, 2), 16)


def _scales_and_minima(raw: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K, [rows, blocks, 8] each: factors of 6 bits, of two float16."""
    first, second, third = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    factors = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=-1)
    lows = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=-1)
    scales = _half(raw, 0)[..., None] * factors.astype(np.float32)
    return scales, -(_half(raw, 2)[..., None] * lows.astype(np.float32))


def _pairs(raw: Bytes) -> NDArray[np.int8]:
    """128 bytes as 8 blocks of 32: the lower halves of 32 bytes, then their upper ones."""
    parts = raw.reshape(*raw.shape[:-1], 4, 32)
    return _nibbles(parts).reshape(*raw.shape[:-1], 8, 32)


def _q4_k(raw: Bytes) -> Blocks:
    return _of_super(_pairs(raw[..., 16:]), *_scales_and_minima(raw), 8)


def _q5_k(raw: Bytes) -> Blocks:
    high = raw[..., 16:48, None] >> np.arange(8, dtype=np.uint8) & 1
    fifths = np.swapaxes(high, -1, -2).astype(np.int8) << 4
    return _of_super(_pairs(raw[..., 48:]) | fifths, *_scales_and_minima(raw), 16)


def _q6_k(raw: Bytes) -> Blocks:
    """Two halves of 128 weights: 64 bytes with lower halves, 32 with two upper bits for each."""
    low = _nibbles(raw[..., :128].reshape(*raw.shape[:-1], 2, 64))
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    high = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32) >> shifts[:, None] & 3
    high = high.reshape(low.shape).astype(np.int8) << 4
    numbers = ((low | high) - np.int8(32)).reshape(*raw.shape[:-1], 16, 16)
    factors = np.ascontiguousarray(raw[..., 192:208]).view(np.int8).astype(np.float32)
    return _of_super(numbers, _half(raw, 208)[..., None] * factors)


def _of_super(
    numbers: NDArray[np.int8], scales: Floats, minima: Floats | None = None, middle: int = 0
) -> Blocks:
    """Of the K types: blocks of blocks, as if there were only the small ones."""
    rows, inner = len(numbers), numbers.shape[-1]
    return Blocks(
        numbers.reshape(rows, -1, inner),
        scales.reshape(rows, -1),
        None if minima is None else minima.reshape(rows, -1),
        middle,
    )


_READERS: Mapping[str, Callable[[Bytes], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def plain_rows(stored: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows as `transformers` has them, of those of so many heads whose halves are interleaved."""
    halves = stored.reshape(heads, len(stored) // heads // 2, 2, -1)
    return halves.swapaxes(1, 2).reshape(stored.shape)
