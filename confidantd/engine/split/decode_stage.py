"""One stage in generation whose blocks are shared out over backends: a compiled program each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.config import Split
from confidantd.engine.backends.base import Backend
from confidantd.engine.generation.stage import check_room
from confidantd.engine.lora import merge
from confidantd.engine.program import load_programs
from confidantd.engine.split.choice import Memory
from confidantd.engine.split.decode_blocks import BLOCK_PROGRAM, DecodeRunner, FusedDecode, position
from confidantd.engine.split.kv_cache import SequenceCache
from confidantd.engine.split.scheduled_decode import ScheduledDecode
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats, Reader, load
from confidantd.engine.trained_weights import Group
from confidantd.errors import ProtocolError
from confidantd.models.tensors import block_sources, embedding_sources, head_sources
from confidantd.wire.stage import StageSpec

Weights = dict[str, Floats]


class SplitStage:
    """A `GeneratingStage` of programs of blocks and of their parts.

    An adapter (`spec.lora` and `read_adapter`) is merged into the weights at load. Everything
    runs on the CPU until `schedule` shares out the blocks.
    """

    def __init__(
        self,
        spec: StageSpec,
        programs: Mapping[str, Path],
        read: Reader,
        read_adapter: Reader | None,
        threads: int,
    ) -> None:
        self._spec = spec
        self._paths, self._threads = programs, threads
        self._programs = load_programs(programs, _needed(spec), threads)
        self._team: Team | None = None
        self._embedding: Weights = {}
        if spec.embedding:
            self._embedding = _load(embedding_sources(spec.model), read)
        layers = range(spec.first_layer, spec.past_last_layer)
        self._blocks = [Group(_load(block_sources(spec.model, layer), read)) for layer in layers]
        if spec.lora is not None and read_adapter is not None:
            for layer, block in zip(layers, self._blocks, strict=True):
                merge(block.weights, spec.model, spec.lora, layer, read_adapter)
        if self._blocks:
            self._runner: DecodeRunner = FusedDecode(self._programs[BLOCK_PROGRAM])
        self._head = self._load_head(read) if spec.head else {}
        self._sequences: dict[int, SequenceCache] = {}

    def _load_head(self, read: Reader) -> Weights:
        *norm, table = head_sources(self._spec.model)
        if self._spec.model.tied and self._spec.embedding:
            return _load(norm, read) | {"head.weight": self._embedding["embedding.weight"]}
        return _load((*norm, table), read)

    def schedule(
        self,
        backends: Sequence[Backend],
        memory: Memory,
        report: Report,
        split: Split = "auto",
    ) -> None:
        """Share the blocks out over backends, the way that is fastest here."""
        if len(backends) > 1 and self._blocks:
            self._team = Team(backends, self._paths, self._threads, report)
            self._runner = ScheduledDecode(
                self._spec, self._blocks, self._team, memory, report, split
            )

    def close(self) -> None:
        """End the backends' threads."""
        if self._team is not None:
            self._team.close()

    def forward(self, sequences: Sequence[int], x: NDArray[Any], rows: int = 1) -> Floats:
        """As a `GeneratingStage`; one sequence after the other."""
        found = [self._row(s, x[i : i + 1], rows) for i, s in enumerate(sequences)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _row(self, sequence: int, x: NDArray[Any], rows: int) -> Floats:
        """Of one sequence."""
        cache = self._sequences.get(sequence)
        if cache is None:
            cache = self._sequences[sequence] = SequenceCache(self._spec.model.block)
        past, steps = cache.length, x.shape[1]
        check_room(self._spec.model, past + steps)
        if self._spec.embedding:
            feeds = {"ids": x, "past": position(cache)}
            x = self._programs["embedding_decode"].run(feeds, self._embedding)["y"]
        for layer, block in enumerate(self._blocks):
            x = self._runner.forward(x, layer, block, cache)
        cache.length = past + steps
        if not self._spec.head:
            return x
        program, steps = self._programs["head_logits"], x.shape[1]
        places = range(steps - rows, steps)
        found = [program.run({"x": x[:, i : i + 1]}, self._head)["logits"] for i in places]
        return np.stack(found, axis=1)

    def begin(self, sequence: int, source: int, length: int, *, kept: bool) -> None:
        """As a `GeneratingStage`."""
        cache = self._sequences.get(source)
        if cache is None or cache.length < length or sequence in self._sequences:
            raise ProtocolError("a sequence cannot begin with what is not there")
        if not kept:
            del self._sequences[source]
        self._sequences[sequence] = cache.beginning(length) if kept else cache.cut(length)

    def truncate(self, sequence: int, length: int) -> None:
        """As a `GeneratingStage`."""
        cache = self._sequences.get(sequence)
        if cache is not None:
            cache.cut(length)

    def length(self, sequence: int) -> int:
        """As a `GeneratingStage`."""
        cache = self._sequences.get(sequence)
        return 0 if cache is None else cache.length

    def release(self, sequence: int) -> None:
        """As a `GeneratingStage`."""
        self._sequences.pop(sequence, None)

    def resident_bytes(self) -> dict[str, int]:
        """As a `GeneratingStage`."""
        groups = (self._embedding, *(block.weights for block in self._blocks), self._head)
        arrays = {id(a): a.nbytes for weights in groups for a in weights.values()}
        cached = sum(cache.bytes for cache in self._sequences.values())
        return {"weights": sum(arrays.values()), "cache": cached}


def _load(sources: Any, read: Reader) -> Weights:
    return {source.parameter.name: load(source, read, writable=False) for source in sources}


def _needed(spec: StageSpec) -> set[str]:
    names = {BLOCK_PROGRAM} if spec.past_last_layer > spec.first_layer else set()
    names |= {"embedding_decode"} if spec.embedding else set()
    return names | ({"head_logits"} if spec.head else set())
