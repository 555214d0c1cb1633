"""Which matrices of a model are quantised, and what its parts take then.

Those of all linear modules, and the LM head in 8 bits: it takes part in every token, and a head
of 4 bits costs more than all blocks do. Embedding, norms and biases stay as they are; so a head
that shares the embedding's table has one of its own then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from confidantd.errors import UsageError
from confidantd.models.block_format import Bits, BlockFormat
from confidantd.models.families import family_of
from confidantd.models.spec import ModelSpec
from confidantd.models.tensors import (
    Source,
    block_parameters,
    block_sources,
    head_parameters,
    head_sources,
)

FLOAT_BYTES = 4
CHOICES = ("none", "int8", "int4")
_HEAD_BITS: Bits = 8


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A matrix [out, in] of this name, made of a tensor of the checkpoint, which is [in, out]
    if it is `transposed`.
    """

    name: str
    stored: str
    transposed: bool
    shape: tuple[int, int]
    format: BlockFormat


def quantised_spec(spec: ModelSpec, choice: str) -> ModelSpec:
    """The model with quantised weights; `int4:16` is `int4` with blocks of 16 weights."""
    if choice == "none":
        return spec
    bits, _, block = choice.partition(":")
    form = BlockFormat.parse(f"{bits.upper()}:{block or 32}")
    if form is None or bits not in CHOICES:
        raise UsageError(
            f"weights cannot be quantised as {choice!r:.40}",
            "none, int8 or int4; a block size may follow: int4:16, :32, :64, :128 or :256",
        )
    return replace(spec, tied=False, quantised=form.name)


def format_of(spec: ModelSpec) -> BlockFormat | None:
    """The format of the blocks' matrices; None if they are not quantised."""
    return BlockFormat.parse(spec.quantised)


def quantised_matrices(spec: ModelSpec, *, tied: bool) -> tuple[QuantisedMatrix, ...]:
    """Of a quantised model, whose checkpoint may be `tied`."""
    form = format_of(spec)
    assert form is not None
    transposed = not family_of(spec.family).output_major
    sources = (source for layer in range(spec.layers) for source in block_sources(spec, layer))
    found = [_matrix(s, s.name, transposed, form) for s in sources if _is_matrix(s)]
    head, stored = head_sources(spec)[-1], head_sources(replace(spec, tied=tied))[-1]
    return (*found, _matrix(head, stored.name, False, _head_format(form)))


def block_bytes(spec: ModelSpec) -> int:
    """Memory of the weights of one block."""
    form = format_of(spec)
    if form is None:
        return FLOAT_BYTES * block_parameters(spec)
    transposed = not family_of(spec.family).output_major
    sources = block_sources(spec, 0)
    matrices = [_matrix(s, s.name, transposed, form) for s in sources if _is_matrix(s)]
    others = [s for s in sources if not _is_matrix(s)]
    return sum(form.memory(m.shape) for m in matrices) + _float_bytes(others)


def head_bytes(spec: ModelSpec) -> int:
    """Memory of the weights after the last block, the tied table included. ONNX Runtime keeps
    room for a second head, the largest matrix, after it packed it: measured.
    """
    form = format_of(spec)
    if form is None:
        return FLOAT_BYTES * head_parameters(spec)
    *others, head = head_sources(spec)
    head_format, shape = _head_format(form), (head.shape[0], head.shape[1])
    twice = math.prod(head_format.packed_shape(shape))
    return head_format.memory(shape) + twice + _float_bytes(others)


def _head_format(form: BlockFormat) -> BlockFormat:
    return BlockFormat(_HEAD_BITS, form.block)


def _is_matrix(source: Source) -> bool:
    return len(source.shape) == 2


def _matrix(source: Source, stored: str, transposed: bool, form: BlockFormat) -> QuantisedMatrix:
    rows, columns = source.shape
    shape = (columns, rows) if transposed else (rows, columns)
    return QuantisedMatrix(source.name, stored, transposed, shape, form)


def _float_bytes(sources: list[Source]) -> int:
    return FLOAT_BYTES * sum(math.prod(source.shape) for source in sources)
