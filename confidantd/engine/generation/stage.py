"""One stage of a model in generation, as one program, with a KV cache per sequence."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from confidantd.engine.backends.base import RUN_FAILURES, SessionSetting, first_line
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.generation.graph import cached_width, needs_positions, stage_graph
from confidantd.engine.generation.kv_cache import SequenceCache
from confidantd.engine.generation.weights import AnyReader, StageWeights
from confidantd.engine.tensors import Floats, Reader
from confidantd.errors import WorkerError
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import ModelSpec
from confidantd.wire.stage import StageSpec


class GeneratingStage(Protocol):
    """Blocks [first, past last) of a model, with embedding and head where it has them."""

    def forward(self, sequence: int, x: NDArray[Any]) -> Floats:
        """Ids [1, T] (embedding stage) or hidden states [1, T, D] that follow what the
        sequence's cache holds. Gives hidden states [1, T, D]; on the head stage the logits [V]
        of the last position.
        """
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what the sequence's cache holds after its first `length` positions."""
        ...

    def release(self, sequence: int) -> None:
        """Drop the sequence's cache."""
        ...

    def resident_bytes(self) -> dict[str, int]:
        """Memory by kind: weights (each array once) and cache."""
        ...

    def close(self) -> None:
        """End what runs beside it."""
        ...


class FusedStage:
    """A `GeneratingStage` on the CPU. An adapter (`spec.lora` and `read_adapter`) is computed
    beside the weights.
    """

    def __init__(
        self, spec: StageSpec, read: AnyReader, read_adapter: Reader | None, threads: int
    ) -> None:
        self._spec = spec
        graph = stage_graph(StageWeights(spec, read, read_adapter))
        self._weights = graph.weights  # the session computes with this memory
        self._session = CpuBackend().written_session(
            graph.file(), graph.weights, SessionSetting(threads)
        )
        self._sequences: dict[int, _Sequence] = {}

    def forward(self, sequence: int, x: NDArray[Any]) -> Floats:
        """As a `GeneratingStage`."""
        found = self._sequences.get(sequence)
        if found is None:
            found = self._sequences[sequence] = _Sequence(self._spec, self._session)
        check_room(self._spec.model, found.cache.length + x.shape[1])
        try:
            return found.forward(x)
        except RUN_FAILURES as failure:
            reason = first_line(failure)
            if "allocate" in str(failure) or "bad_alloc" in str(failure):
                raise MemoryError(reason) from None
            raise WorkerError(f"the stage failed: {reason}") from None

    def truncate(self, sequence: int, length: int) -> None:
        """As a `GeneratingStage`."""
        found = self._sequences.get(sequence)
        if found is not None:
            found.cache.length = min(found.cache.length, length)

    def release(self, sequence: int) -> None:
        """As a `GeneratingStage`."""
        self._sequences.pop(sequence, None)

    def resident_bytes(self) -> dict[str, int]:
        """As a `GeneratingStage`."""
        cached = sum(found.cache.bytes for found in self._sequences.values())
        return {"weights": sum(a.nbytes for a in self._weights.values()), "cache": cached}

    def close(self) -> None:
        """Nothing runs beside it."""


class _Sequence:
    """A cache that is bound to the stage's program: its memory is written in place."""

    def __init__(self, spec: StageSpec, session: onnxruntime.InferenceSession) -> None:
        self._spec, self._session = spec, session
        self.cache = SequenceCache(spec.model.block, width=cached_width(spec.model.block))
        self._binding = session.io_binding()
        self._bound_capacity = 0
        self._last, self._length = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._kept: dict[str, NDArray[Any]] = {}  # what is bound must outlive the run
        if self._layers:
            self._bind("last", self._last)
            self._bind("length", self._length)

    @property
    def _layers(self) -> range:
        return range(self._spec.first_layer, self._spec.past_last_layer)

    def forward(self, x: NDArray[Any]) -> Floats:
        """One run; the cache is longer afterwards."""
        spec, model = self._spec, self._spec.model
        past, steps = self.cache.length, x.shape[1]
        length = past + steps
        self.cache.reserve(length)
        if self._layers and self._bound_capacity != self.cache.capacity:
            self._bind_cache()
        self._last[...], self._length[...] = length - 1, length
        self._bind("ids" if spec.embedding else "x", x)
        if needs_positions(spec):
            self._bind("positions", np.arange(past, length)[None])
        if spec.head:
            self._bind("first_row", np.array([steps - 1]))
        shape = (1, 1, model.vocabulary) if spec.head else (1, steps, model.block.hidden)
        found = np.empty(shape, np.float32)
        name = "logits" if spec.head else "y"
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, found.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.cache.length = length
        return found[0, 0] if spec.head else found

    def _bind(self, name: str, given: NDArray[Any]) -> None:
        array = given if given.flags.c_contiguous else np.ascontiguousarray(given)
        self._kept[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_cache(self) -> None:
        """The same memory for the past and the new keys and values."""
        for index, layer in enumerate(self._layers):
            for kind, buffer in zip(("key", "value"), self.cache.buffers(index), strict=True):
                place = ("cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
                self._binding.bind_input(f"{kind}.{layer}", *place)
                self._binding.bind_output(f"new_{kind}.{layer}", *place)
        self._bound_capacity = self.cache.capacity
        rope, head_dim = self._spec.model.block.rope, self._spec.model.block.head_dim
        if rope is not None:
            positions = np.arange(self._bound_capacity, dtype=np.float32)[:, None]
            angles = positions * np.array(rope_frequencies(rope, head_dim), np.float32)
            self._bind("cosine", np.cos(angles))
            self._bind("sine", np.sin(angles))


def check_room(model: ModelSpec, length: int) -> None:
    """Learned positions end somewhere."""
    if model.positions == "learned" and length > model.max_positions:
        raise WorkerError(
            f"the sequence has {length} tokens, the model takes {model.max_positions}",
            "ask for fewer new tokens or give a shorter prompt",
        )
