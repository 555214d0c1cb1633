"""How weights are quantised: in blocks of a row, each with a scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, Self, cast

Bits = Literal[4, 8]
SCALE_BYTES = 2  # float16, as stored
PACKED_BYTES = 12  # beside the numbers of a block, in memory
OFFSET_BYTES = 4
_NAME = re.compile(r"INT([48]):(16|32|64|128|256)(\+?)")


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """So many bits a weight, and so many weights a scale. `offsets`: to the weights of each block
    a number is added; files of ours have none.
    """

    bits: Bits
    block: int
    offsets: bool = False

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """From its name; None if it is none."""
        found = _NAME.fullmatch(name)
        return (
            None
            if found is None
            else cls(cast("Bits", int(found[1])), int(found[2]), found[3] == "+")
        )

    @property
    def name(self) -> str:
        """As the `dtype` of a tensor."""
        return f"INT{self.bits}:{self.block}{'+' if self.offsets else ''}"

    def blocks(self, width: int) -> int:
        """Of a row."""
        return -(-width // self.block)

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Of the numbers of a matrix, as bytes."""
        return shape[0], self.blocks(shape[1]), self.block * self.bits // 8

    def memory(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix that is computed with: ONNX Runtime packs the numbers, with scales and
        block sums in float32, and keeps the scales that it was given.
        """
        beside = PACKED_BYTES + (OFFSET_BYTES if self.offsets else 0)
        return math.prod(self.packed_shape(shape)) + beside * shape[0] * self.blocks(shape[1])

    def table_memory(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix whose rows are looked up: numbers, scales and offsets in float32."""
        beside = 4 + (OFFSET_BYTES if self.offsets else 0)
        return math.prod(self.packed_shape(shape)) + beside * shape[0] * self.blocks(shape[1])

    def size(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix: its numbers, then its scales in float16."""
        return math.prod(self.packed_shape(shape)) + SCALE_BYTES * shape[0] * self.blocks(shape[1])
