"""Which matrices of a model are quantised, and what its parts take then.

Where a user asks for it, those of all linear modules, and the LM head in 8 bits: it takes part in
every token, and a head of 4 bits costs more than all blocks do. Embedding, norms and biases stay
as they are; so a head that shares the embedding's table has one of its own then. A file that is
quantised itself says which of its matrices are, and each has the format it has there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from confidantd.errors import UsageError
from confidantd.models.block_format import Bits, BlockFormat
from confidantd.models.families import family_of
from confidantd.models.gguf_format import GgufFormat
from confidantd.models.layout import linears
from confidantd.models.spec import ModelSpec
from confidantd.models.tensors import Source, block_sources, embedding_sources, head_sources

FLOAT_BYTES = 4
CHOICES = ("none", "int8", "int4")
HEAD, EMBEDDING = "head", "embedding"  # beside the names of linear modules
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
    if form is None or form.offsets or bits not in CHOICES:
        raise UsageError(
            f"weights cannot be quantised as {choice!r:.40}",
            "none, int8 or int4; a block size may follow: int4:16, :32, :64, :128 or :256",
        )
    return replace(spec, tied=False, quantised=form.name)


def own_spec(spec: ModelSpec, formats: str) -> ModelSpec:
    """The model with the formats that its file has; a head of which may then be a tied table's."""
    found = replace(spec, quantised=formats)
    return replace(found, tied=spec.tied and HEAD not in formats_of(found))


def own_formats(spec: ModelSpec, dtypes: Mapping[str, str]) -> str:
    """What is quantised in a file whose tensors have these dtypes: for each kind of module the
    format that takes most memory in any layer; empty where nothing is.
    """
    found: dict[str, str] = {}
    kinds = [*(linear.name for linear in linears(spec.block)), EMBEDDING, HEAD]
    sources = [s for layer in range(spec.layers) for s in block_sources(spec, layer)]
    sources += [*embedding_sources(spec), *head_sources(spec)]
    for kind in kinds:
        same = [s for s in sources if s.parameter.name == f"{kind}.weight"]
        forms = [_packed(dtypes.get(source.name, "")) for source in same]
        packed = [form for form in forms if form is not None]
        if packed and len(packed) == len(forms):
            rows, width = same[0].shape
            found[kind] = max(packed, key=lambda form: form.memory((rows, width))).name
    return " ".join(f"{kind}={form}" for kind, form in found.items())


def _packed(dtype: str) -> BlockFormat | None:
    form = GgufFormat.parse(dtype)
    return None if form is None else form.type.packed


def formats_of(spec: ModelSpec) -> Mapping[str, BlockFormat]:
    """The formats of what is quantised: by names of linear modules, `head` and `embedding`."""
    same = BlockFormat.parse(spec.quantised)
    if same is not None:
        blocks = {linear.name: same for linear in linears(spec.block)}
        return {**blocks, HEAD: BlockFormat(_HEAD_BITS, same.block)}
    pairs = (pair.partition("=") for pair in spec.quantised.split())
    found = {kind: BlockFormat.parse(name) for kind, _, name in pairs}
    return {kind: form for kind, form in found.items() if form is not None}


def quantised_matrices(spec: ModelSpec, *, tied: bool) -> tuple[QuantisedMatrix, ...]:
    """Of a quantised model, whose checkpoint may be `tied`; those that are multiplied by."""
    formats = formats_of(spec)
    sources = (source for layer in range(spec.layers) for source in block_sources(spec, layer))
    found = [_matrix(spec, s, s.name, formats[_kind(s)]) for s in sources if _kind(s) in formats]
    if HEAD in formats:
        head, stored = head_sources(spec)[-1], head_sources(replace(spec, tied=tied))[-1]
        found.append(_matrix(spec, head, stored.name, formats[HEAD]))
    return tuple(found)


def block_bytes(spec: ModelSpec) -> int:
    """Memory of the weights of one block."""
    return sum(_memory(spec, source) for source in block_sources(spec, 0))


def embedding_bytes(spec: ModelSpec) -> int:
    """Memory of the weights before the first block."""
    form, sources = formats_of(spec).get(EMBEDDING), embedding_sources(spec)
    if form is None:
        return _float_bytes(sources)
    rows, width = sources[0].shape
    return form.table_memory((rows, width)) + _float_bytes(sources[1:])


def head_bytes(spec: ModelSpec) -> int:
    """Memory of the weights after the last block, the tied table included. ONNX Runtime keeps
    room for a second head, the largest matrix, after it packed it: measured.
    """
    sources, form = head_sources(spec), formats_of(spec).get(HEAD)
    found = sum(_memory(spec, source) for source in sources)
    if form is None:
        return found
    rows, width = sources[-1].shape
    return found + math.prod(form.packed_shape((rows, width)))


def _memory(spec: ModelSpec, source: Source) -> int:
    form = formats_of(spec).get(_kind(source))
    if form is None:
        return _float_bytes((source,))
    return form.memory(_matrix(spec, source, source.name, form).shape)


def _kind(source: Source) -> str:
    """Of a matrix, as `formats_of` names it; empty for norms and biases."""
    return source.parameter.name.removesuffix(".weight") if len(source.shape) == 2 else ""


def _matrix(spec: ModelSpec, source: Source, stored: str, form: BlockFormat) -> QuantisedMatrix:
    rows, columns = source.shape
    turned = _kind(source) != HEAD and not family_of(spec.family).output_major
    shape = (columns, rows) if turned else (rows, columns)
    return QuantisedMatrix(source.name, stored, turned, shape, form)


def _float_bytes(sources: tuple[Source, ...]) -> int:
    return FLOAT_BYTES * sum(math.prod(source.shape) for source in sources)
