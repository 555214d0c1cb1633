"""How tensors lie in GGUF files: their types, and the order of their rows.

A quantised row is cut into blocks of so many weights, each so many bytes. `llama.cpp` stores the
rows of Llama's query and key matrices in another order than `transformers`: within a head the
halves that rotary positions turn together are interleaved, row i of the first half before row i of
the second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from confidantd.models.block_format import BlockFormat

PREFIX = "GGUF:"
_NAME = re.compile(r"GGUF:([A-Z0-9_]{1,8})(?::([1-9][0-9]{0,4}))?")


@dataclass(frozen=True, slots=True)
class GgufType:
    """A type of tensor: `block` weights take `bytes`. `packed`: what it is computed with as."""

    name: str
    block: int
    bytes: int
    packed: BlockFormat | None = None

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.bytes


_EIGHT = BlockFormat(8, 32)
_OFFSET_FOUR, _OFFSET_EIGHT = BlockFormat(4, 32, offsets=True), BlockFormat(8, 32, offsets=True)
TYPES: Mapping[int, GgufType] = {  # by their numbers in a file
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    30: GgufType("BF16", 1, 2),
    2: GgufType("Q4_0", 32, 18, BlockFormat(4, 32)),
    3: GgufType("Q4_1", 32, 20, _OFFSET_FOUR),
    6: GgufType("Q5_0", 32, 22, _EIGHT),
    7: GgufType("Q5_1", 32, 24, _OFFSET_EIGHT),
    8: GgufType("Q8_0", 32, 34, _EIGHT),
    12: GgufType("Q4_K", 256, 144, _OFFSET_FOUR),
    13: GgufType("Q5_K", 256, 176, _OFFSET_EIGHT),
    14: GgufType("Q6_K", 256, 210, BlockFormat(8, 16)),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
# Types that are not read, so that a message can name them.
OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """Of one tensor. `heads`: the rows of so many heads are interleaved; 0: none are."""

    type: GgufType
    heads: int = 0

    @classmethod
    def parse(cls, dtype: str) -> Self | None:
        """From the `dtype` of a tensor; None if it is none."""
        found = _NAME.fullmatch(dtype)
        kind = None if found is None else BY_NAME.get(found[1])
        return None if found is None or kind is None else cls(kind, int(found[2] or 0))

    @property
    def dtype(self) -> str:
        """Its name, which is safetensors' for plain numbers in plain order."""
        if not self.heads:
            return self.type.name if self.type.block == 1 else f"{PREFIX}{self.type.name}"
        return f"{PREFIX}{self.type.name}:{self.heads}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can lie so."""
        if not 1 <= len(shape) <= 2 or min(shape) < 1:
            return False
        whole = shape[-1] % self.type.block == 0 and (len(shape) == 2 or self.type.block == 1)
        return whole and (not self.heads or shape[0] % (2 * self.heads) == 0)
