"""What blocks of a shape take on this device: the stages that jobs run, on random weights.

One block in both forms, the head, the embedding and the optimizer, each for a while, and what
a block loses to the activations that pass through the device meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.generation.stage import FusedStage, GeneratingStage
from confidantd.engine.quantised import Quantised, any_quantised
from confidantd.engine.tensors import Array, Floats
from confidantd.engine.train_stage import TrainStage
from confidantd.models.quantisation import block_bytes, quantised_matrices
from confidantd.models.spec import Form, ProgramRequest
from confidantd.models.tensors import (
    block_parameters,
    block_sources,
    embedding_sources,
    head_sources,
)
from confidantd.planner.speeds import measured_blocks, measured_decode_blocks
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageSpec

# The mean of so many runs and over so long at least, after one that also fills memory: a device
# that is throttled or shared does nothing for some ms again and again, which belongs to it.
ROUNDS, WINDOW_SECONDS = 3, 0.25
PARTS = 5  # of what is measured for training, for its progress
PAST = 64  # positions in the cache before them
SOME_FLOATS = 1 << 20  # random numbers, repeated: to draw a whole table takes seconds


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, with the programs in files; `ends`: the head and the embedding too.

    `traffic` gives the seconds that a message between stages takes from work it is given.
    """

    request: ProgramRequest
    programs: Mapping[str, Path]
    threads: int
    ends: bool
    traffic: Callable[[Callable[[], None]], float]

    def speeds(self, progress: Callable[[int, int], None]) -> Speeds:
        """All of it."""
        if self.request.purpose == "generate":
            return self._generation(progress)
        return self._training(progress)

    def _training(self, progress: Callable[[int, int], None]) -> Speeds:
        progress(0, PARTS)
        model = self.request.model
        blocks = measured_blocks(model.layers, block_parameters(model))
        saved = self._stage(blocks=blocks)
        forward, backward = _passes(saved, *self._hidden(), blocks)
        update = self._update(saved)
        progress(1, PARTS)
        message = self.traffic(self._block_work(saved))
        del saved
        progress(2, PARTS)
        recomputing = self._stage(blocks=blocks, form="recompute")
        again = _passes(recomputing, *self._hidden(), blocks)
        del recomputing
        progress(3, PARTS)
        head = self._head() if self.ends else None
        progress(4, PARTS)
        embedding = self._embedding() if self.ends and self.request.method == "full" else 0.0
        progress(PARTS, PARTS)
        return Speeds(forward, backward, *again, head, embedding, update, message)

    def _block_work(self, stage: TrainStage) -> Callable[[], None]:
        x, dy = self._hidden()

        def work() -> None:
            stage.forward(0, x)
            stage.backward(0, dy)

        return work

    def _update(self, stage: TrainStage) -> float:
        """Seconds per parameter; a step that follows no backward would have nothing to do."""
        seconds = _mean(lambda: stage.step(1e-4, 1.0), before=self._block_work(stage))
        return seconds / max(stage.trained_parameters(), 1)

    def _hidden(self) -> tuple[Floats, Floats]:
        request = self.request
        shape = (request.microbatch_size, request.sequence_length, request.model.block.hidden)
        return _some(shape), _some(shape)[::-1].copy()

    def _head(self) -> float:
        stage, (x, _) = self._stage(head=True), self._hidden()
        labels = self._ids()

        def both() -> None:
            stage.forward(0, x)
            stage.set_labels(0, labels, 1.0)
            stage.backward(0, None)

        return _mean(both)

    def _embedding(self) -> float:
        stage, (_, dy) = self._stage(embedding=True), self._hidden()
        ids = self._ids()

        def both() -> None:
            stage.forward(0, ids)
            stage.backward(0, dy)

        return _mean(both)

    def _ids(self) -> NDArray[np.int64]:
        request = self.request
        shape = (request.microbatch_size, request.sequence_length)
        return np.random.default_rng(0).integers(0, request.model.vocabulary, shape)

    def _stage(
        self, *, blocks: int = 0, embedding: bool = False, head: bool = False, form: Form = "saved"
    ) -> TrainStage:
        request = self.request
        spec = replace(
            self._spec(blocks, embedding=embedding, head=head),
            training=request.method,
            lora=request.lora,
            form=form,
            microbatch_size=request.microbatch_size,
            sequence_length=request.sequence_length,
        )
        return TrainStage(spec, self.programs, self._reader(), None, self.threads)

    def _generation(self, progress: Callable[[int, int], None]) -> Speeds:
        progress(0, 2)
        model = self.request.model
        past = min(PAST, model.max_positions // 2) if model.positions == "learned" else PAST
        count = measured_decode_blocks(model.layers, block_bytes(model))
        blocks = self._decoder(self._spec(count))
        blocks.forward([0], _some((1, past, model.block.hidden)))
        forward = self._token_seconds(blocks, past) / count
        del blocks
        progress(1, 2)
        head = None
        if self.ends:
            head = self._token_seconds(self._decoder(self._spec(0, head=True)), 0)
        progress(2, 2)
        return Speeds(forward, head=head)

    def _token_seconds(self, stage: GeneratingStage, past: int) -> float:
        """One token after `past` others."""
        token = _some((1, 1, self.request.model.block.hidden))
        return _mean(lambda: stage.forward([0], token), before=lambda: stage.truncate(0, past))

    def _decoder(self, spec: StageSpec) -> GeneratingStage:
        return FusedStage(spec, self._reader(), None, self.threads)

    def _spec(self, blocks: int, *, embedding: bool = False, head: bool = False) -> StageSpec:
        model = replace(self.request.model, layers=max(1, blocks), tied=False)
        return StageSpec(model, 0, blocks, embedding, head, None)

    def _reader(self) -> Any:
        model = replace(self.request.model, tied=False)
        blocks = (source for layer in range(model.layers) for source in block_sources(model, layer))
        sources = (*blocks, *embedding_sources(model), *head_sources(model))
        shapes = {source.name: source.shape for source in sources}
        quantised = quantised_matrices(model, tied=False) if model.quantised else ()
        formats = {matrix.name: matrix for matrix in quantised}

        def read(name: str) -> Array | Quantised:
            if name in formats:
                return any_quantised(formats[name].format, formats[name].shape, name)
            return _some(shapes[name])

        return read


def _passes(stage: TrainStage, x: Floats, dy: Floats, blocks: int) -> tuple[float, float]:
    """Mean seconds of a forward and of a backward of one of its blocks."""
    between = 0.0

    def forward() -> None:
        nonlocal between
        started = time.perf_counter()
        stage.forward(0, x)
        between += time.perf_counter() - started

    stage.forward(0, x)
    stage.backward(0, dy)
    rounds, began = 0, time.perf_counter()
    while rounds < ROUNDS or time.perf_counter() - began < WINDOW_SECONDS:
        forward()
        stage.backward(0, dy)
        rounds += 1
    whole = time.perf_counter() - began
    return between / (rounds * blocks), (whole - between) / (rounds * blocks)


def _mean(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of `work`, without those of what comes `before` each time."""
    before()
    work()
    rounds, seconds, began = 0, 0.0, time.perf_counter()
    while rounds < ROUNDS or time.perf_counter() - began < WINDOW_SECONDS:
        before()
        started = time.perf_counter()
        work()
        seconds += time.perf_counter() - started
        rounds += 1
    return seconds / rounds


def _some(shape: tuple[int, ...]) -> Floats:
    """Small random numbers of either sign."""
    numbers = np.random.default_rng(1).standard_normal(SOME_FLOATS, np.float32)
    return np.resize(numbers * np.float32(0.02), shape)
