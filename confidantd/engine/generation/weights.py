"""The weights of a generating stage as its graph takes them: as they lie in the checkpoint.

Nothing is transposed, so what is stored in float32 stays a memory map of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from confidantd.engine.quantised import Quantised
from confidantd.engine.tensors import Array, Floats, Reader, floats, stored
from confidantd.errors import ModelError
from confidantd.models.adapter import adapter_sources
from confidantd.models.families import family_of
from confidantd.models.tensors import Source, block_sources, embedding_sources, head_sources
from confidantd.wire.stage import StageSpec

AnyReader = Callable[[str], Array | Quantised]  # as a Reader, of tensors that may be quantised


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out, in], or [in, out] if it is not `output_major`; a quantised one never is."""

    name: str
    array: Floats | Quantised
    output_major: bool = True


@dataclass(frozen=True, slots=True)
class Factors:
    """An adapter of a linear module: a [r, in] and b [out, r]; `scale` multiplies it."""

    a: Matrix
    b: Matrix
    scale: float


class StageWeights:
    """Reads what a stage needs when its graph is made; `read_adapter` for `spec.lora`."""

    def __init__(self, spec: StageSpec, read: AnyReader, read_adapter: Reader | None) -> None:
        self.spec = spec
        self._read, self._read_adapter = read, read_adapter
        self._output_major = family_of(spec.model.family).output_major
        self._shared: Floats | None = None  # a table that is both ends

    def table(self, name: str) -> tuple[str, Array | Quantised]:
        """A table of the embedding by its parameter's name, float16 if it is stored so."""
        source = _by_parameter(embedding_sources(self.spec.model))[name]
        quantised = self._read(source.name)
        if isinstance(quantised, Quantised) and quantised.shape == source.shape:
            return source.name, quantised
        array = stored(source, lambda _: quantised)
        if self.spec.model.tied and self.spec.head and name == "embedding.weight":
            self._shared = floats(array)
            return source.name, self._shared
        return source.name, array if array.dtype == np.float16 else floats(array)

    def norm(self, layer: int | None, name: str) -> list[tuple[str, Floats]]:
        """Scale, and offset if there is one; `layer` None for the head's."""
        model = self.spec.model
        sources = head_sources(model) if layer is None else block_sources(model, layer)
        found = [s for s in sources if s.parameter.name.startswith(f"{name}.")]
        return [(source.name, _floats(source, self._read)) for source in found]

    def matrix(self, layer: int, name: str) -> Matrix:
        """The matrix of a linear module."""
        source = _by_parameter(block_sources(self.spec.model, layer))[f"{name}.weight"]
        return self._matrix(source, self._output_major)

    def bias(self, layer: int, name: str) -> tuple[str, Floats]:
        """The bias of a linear module."""
        source = _by_parameter(block_sources(self.spec.model, layer))[f"{name}.bias"]
        return source.name, _floats(source, self._read)

    def head(self) -> Matrix:
        """The LM head [V, D]; with tied weights the embedding's table."""
        source = _by_parameter(head_sources(self.spec.model))["head.weight"]
        if self._shared is not None:
            return Matrix(source.name, self._shared)
        return self._matrix(source, output_major=True)

    def _matrix(self, source: Source, output_major: bool) -> Matrix:
        found, shape = self._read(source.name), source.shape
        if isinstance(found, Quantised) and not output_major:
            shape = shape[::-1]
        if found.shape != shape:
            raise ModelError(f"{source.name} has shape {found.shape}, expected {shape}")
        if isinstance(found, Quantised):
            return Matrix(source.name, found)
        return Matrix(source.name, floats(found), output_major)

    def factors(self, layer: int, name: str) -> Factors | None:
        """The adapter of a linear module."""
        lora = self.spec.lora
        if lora is None or self._read_adapter is None:
            return None
        sources = _by_parameter(adapter_sources(self.spec.model, lora, layer))
        if f"{name}.lora_a" not in sources:
            return None
        a, b = (sources[f"{name}.{kind}"] for kind in ("lora_a", "lora_b"))
        read = self._read_adapter
        return Factors(
            Matrix(a.name, _floats(a, read)), Matrix(b.name, _floats(b, read)), lora.scale
        )


def _floats(source: Source, read: AnyReader) -> Floats:
    return floats(stored(source, read))


def _by_parameter(sources: tuple[Source, ...]) -> dict[str, Source]:
    return {source.parameter.name: source for source in sources}
