"""One stage of a model in generation, as one program, for sequences that run together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from confidantd.engine.backends.base import RUN_FAILURES, SessionSetting, first_line
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.generation.batch_cache import BatchCache, BatchCaches
from confidantd.engine.generation.graph import needs_positions, stage_graph
from confidantd.engine.generation.weights import AnyReader, StageWeights
from confidantd.engine.tensors import Array, Floats, Reader, forget_pages
from confidantd.errors import WorkerError
from confidantd.models.layout import cached_width
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import ModelSpec
from confidantd.wire.stage import StageSpec

FORGET_SECONDS = 0.02


class GeneratingStage(Protocol):
    """Blocks [first, past last) of a model, with embedding and head where it has them."""

    def forward(self, sequences: Sequence[int], x: NDArray[Any], rows: int = 1) -> Floats:
        """Ids [b, T] (embedding stage) or hidden states [b, T, D], a row for each of b sequences,
        that follow what the sequences have; T is 1 where b is not. Gives hidden states
        [b, T, D], or on the head stage the logits [b, rows, V] of the last positions.
        """
        ...

    def begin(self, sequence: int, source: int, length: int, *, kept: bool) -> None:
        """Let a sequence have the first `length` positions of a `source`, which ends unless it is
        `kept`; `ProtocolError` if that has fewer.
        """
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence has after its first `length` positions."""
        ...

    def length(self, sequence: int) -> int:
        """Positions that it has of a sequence; 0 of an unknown one."""
        ...

    def release(self, sequence: int) -> None:
        """Forget a sequence."""
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
        self._weights = graph.bound
        with _packing(list(graph.packed.values())):
            self._session = CpuBackend().written_session(
                graph.file(), graph.packed, SessionSetting(threads)
            )
        self._packed_bytes = sum(array.nbytes for array in graph.packed.values())
        block = spec.model.block
        layers = spec.past_last_layer - spec.first_layer
        self._caches = BatchCaches(layers, block.kv_heads, cached_width(block))
        self._runs = WeakKeyDictionary[BatchCache, _Run]()

    def forward(self, sequences: Sequence[int], x: NDArray[Any], rows: int = 1) -> Floats:
        """As a `GeneratingStage`."""
        for sequence in sequences:
            check_room(self._spec.model, self._caches.length(sequence) + x.shape[1])
        cache = self._caches.together(list(sequences))
        run = self._runs.get(cache)
        if run is None:
            run = self._runs[cache] = _Run(self._spec, self._session, self._weights)
        try:
            return run(cache, x, rows)
        except RUN_FAILURES as failure:
            reason = first_line(failure)
            if "allocate" in str(failure) or "bad_alloc" in str(failure):
                raise MemoryError(reason) from None
            raise WorkerError(f"the stage failed: {reason}") from None

    def begin(self, sequence: int, source: int, length: int, *, kept: bool) -> None:
        """As a `GeneratingStage`."""
        self._caches.begin(sequence, source, length, kept=kept)

    def truncate(self, sequence: int, length: int) -> None:
        """As a `GeneratingStage`."""
        self._caches.truncate(sequence, length)

    def length(self, sequence: int) -> int:
        """As a `GeneratingStage`."""
        return self._caches.length(sequence)

    def release(self, sequence: int) -> None:
        """As a `GeneratingStage`."""
        self._caches.release(sequence)

    def resident_bytes(self) -> dict[str, int]:
        """As a `GeneratingStage`."""
        weights = sum(array.nbytes for array in self._weights.values())
        return {"weights": weights + self._packed_bytes, "cache": self._caches.bytes}

    def close(self) -> None:
        """Nothing runs beside it."""


@contextlib.contextmanager
def _packing(arrays: Sequence[Array]) -> Iterator[None]:
    """While a session makes copies of these arrays in another order: what it has read of them
    need not stay in memory.
    """
    over = threading.Event()
    arrays = list({id(getattr(array, "_mmap", array)): array for array in arrays}.values())

    def forget() -> None:
        while not over.wait(FORGET_SECONDS):
            for array in arrays:
                forget_pages(array)

    thread = threading.Thread(target=forget, name="packing", daemon=True)
    if arrays:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if arrays:
            thread.join()
        for array in arrays:
            forget_pages(array)


class _Run:
    """Runs a stage's program on one cache, whose memory is bound to it as long as it stays."""

    def __init__(
        self,
        spec: StageSpec,
        session: onnxruntime.InferenceSession,
        weights: Mapping[str, Array],
    ) -> None:
        self._spec, self._session = spec, session
        self._binding = session.io_binding()
        self._bound_version = -1
        self._kept: dict[str, NDArray[Any]] = {}  # what is bound must outlive the run
        for name, array in weights.items():
            self._bind(name, array)

    def __call__(self, cache: BatchCache, x: NDArray[Any], logits: int) -> Floats:
        """Once; the cache is longer afterwards."""
        spec, model = self._spec, self._spec.model
        rows, steps = x.shape[:2]
        lengths = np.array(cache.lengths, np.int32) + np.int32(steps)
        cache.reserve(int(lengths.max()))
        if spec.past_last_layer > spec.first_layer:
            self._bind_cache(cache)
            self._bind("last", lengths - np.int32(1))
            self._bind("length", lengths.max())
        self._bind("ids" if spec.embedding else "x", x)
        if needs_positions(spec):
            self._bind("positions", lengths[:, None] + np.arange(-steps, 0))
        if spec.head:
            self._bind("first_row", np.array([steps - logits]))
        shape = (rows, logits, model.vocabulary) if spec.head else (rows, steps, model.block.hidden)
        found = np.empty(shape, np.float32)
        name = "logits" if spec.head else "y"
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, found.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        cache.lengths = lengths.tolist()
        return found

    def _bind(self, name: str, given: NDArray[Any] | np.generic) -> None:
        array = np.asarray(given)
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        self._kept[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_cache(self, cache: BatchCache) -> None:
        """The same memory for the past and the new keys and values."""
        if cache.version == self._bound_version:
            return
        for layer, buffers in enumerate(cache.buffers(), self._spec.first_layer):
            for kind, buffer in zip(("key", "value"), buffers, strict=True):
                place = ("cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
                self._binding.bind_input(f"{kind}.{layer}", *place)
                self._binding.bind_output(f"new_{kind}.{layer}", *place)
        rope, head_dim = self._spec.model.block.rope, self._spec.model.block.head_dim
        if rope is not None and len(self._kept.get("cosine", ())) != cache.capacity:
            positions = np.arange(cache.capacity, dtype=np.float32)[:, None]
            angles = positions * np.array(rope_frequencies(rope, head_dim), np.float32)
            self._bind("cosine", np.cos(angles))
            self._bind("sine", np.sin(angles))
        self._bound_version = cache.version


def check_room(model: ModelSpec, length: int) -> None:
    """Learned positions end somewhere."""
    if model.positions == "learned" and length > model.max_positions:
        raise WorkerError(
            f"the sequence has {length} tokens, the model takes {model.max_positions}",
            "ask for fewer new tokens or give a shorter prompt",
        )
