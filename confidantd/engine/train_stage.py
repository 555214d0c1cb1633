"""One stage of a model in training: forward, backward and optimizer on numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.config import Split
from confidantd.engine.adamw import Step
from confidantd.engine.backends.base import Backend
from confidantd.engine.blocks import BlockRunner, FusedBlocks, Saved
from confidantd.engine.head import (
    IGNORED_LABEL,
    HeadPass,
    flat,
    head_loss,
    next_tokens,
    sizes_of,
    table_sum,
)
from confidantd.engine.program import load_programs
from confidantd.engine.rows import embedding_backward
from confidantd.engine.split.choice import Memory
from confidantd.engine.split.head import SplitHead
from confidantd.engine.split.scheduled import ScheduledBlocks
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats, Reader
from confidantd.engine.trained_weights import StageWeights, State, no_state
from confidantd.errors import WorkerError
from confidantd.models.stage_parts import Part
from confidantd.models.tensors import Source
from confidantd.planner.memory import head_chunk
from confidantd.wire.stage import StageSpec, parts_of

Array = NDArray[Any]
BLOCK_PROGRAMS = {"block_forward", "block_recompute", "block_backward"}
HEAD_PROGRAMS = {"head_loss", "head_backward"}


@dataclass(slots=True)
class _Kept:
    """What the backward of a microbatch needs: ids, the input of each block and of the head,
    and in the saved form what each block's forward saved.
    """

    ids: Array | None = None
    inputs: list[Floats] = field(default_factory=list)
    saved: list[Saved | None] = field(default_factory=list)


class TrainStage:
    """Blocks [first, past last) of a model, with embedding and head where it has them.

    B rows, S tokens, D hidden, V vocabulary; ids and labels are int64 [B, S], hidden
    states float32 [B, S, D]. `read` gives checkpoint tensors by Hugging Face name,
    `read_adapter` the `peft` tensors to start from (None: a fresh adapter). Blocks and head
    run on `backend`, the CPU's if there is none, until `schedule` shares them out; the
    embedding, which only looks up and adds rows, stays on the CPU.
    """

    def __init__(
        self,
        spec: StageSpec,
        programs: Mapping[str, Path],
        read: Reader,
        read_adapter: Reader | None,
        threads: int,
        backend: Backend | None = None,
        state: State = no_state,
        steps_done: int = 0,
    ) -> None:
        self._spec = spec
        self._paths, self._threads, self._backend = programs, threads, backend
        self._team: Team | None = None
        self._split_head: SplitHead | None = None
        self._scheduled: ScheduledBlocks | None = None
        self._load_programs()
        self._weights = StageWeights(spec, read, read_adapter, state)
        self._kept: dict[int, _Kept] = {}
        self._labels: dict[int, tuple[Array, Array]] = {}
        self._loss = 0.0
        self._step = steps_done

    def _load_programs(self) -> None:
        """Those that this stage runs, on one backend."""
        spec, paths, threads, backend = self._spec, self._paths, self._threads, self._backend
        tokens = spec.microbatch_size * spec.sequence_length
        self._head_chunk = head_chunk(tokens, spec.model.vocabulary, spec.form)
        embedding = {"embedding_forward"} if spec.embedding else set()
        head = HEAD_PROGRAMS if spec.head else set()
        self._programs = {
            **load_programs(paths, embedding, threads),
            **load_programs(paths, head, threads, backend, sizes_of(self._head_chunk)),
        }
        self._blocks: BlockRunner | None = None
        if spec.past_last_layer > spec.first_layer:
            self._blocks = FusedBlocks(load_programs(paths, BLOCK_PROGRAMS, threads, backend))

    def become(
        self,
        spec: StageSpec,
        read: Reader,
        read_adapter: Reader | None,
        state: State,
        steps_done: int,
    ) -> None:
        """Go on as another stage of the same job, `steps_done` steps from its begin.

        What both have in common stays where it is, unless `state` gives another one to go back
        to; it gives what others trained so far of the rest. A step that is under way is dropped.
        Afterwards it runs on one backend until `schedule`.
        """
        self.close()
        self.abandon()
        self._step = steps_done
        self._team, self._split_head, self._scheduled = None, None, None
        self._spec = spec
        self._load_programs()
        self._weights = StageWeights(spec, read, read_adapter, state, self._weights)

    def abandon(self) -> None:
        """Drop what was computed of a step that does not end."""
        self._kept.clear()
        self._labels.clear()
        self._loss = 0.0
        self._weights.drop_gradients()

    def parts(self) -> frozenset[Part]:
        """Layers and ends of this stage."""
        return parts_of(self._spec)

    def schedule(
        self,
        backends: Sequence[Backend],
        memory: Memory,
        report: Report,
        split: Split = "auto",
    ) -> None:
        """Share the blocks out over backends, the way that is fastest here."""
        if len(backends) > 1 and self._weights.blocks:
            self._team = Team(backends, self._paths, self._threads, report)
            first = self._weights.blocks[0]
            scheduled = ScheduledBlocks(self._spec, first, self._team, memory, report, split)
            self._blocks = self._scheduled = scheduled
            if self._spec.head and len(self._team.names) > 1:
                self._split_head = SplitHead(
                    self._spec, self._weights.head, self._team, memory.of_head(), report, split
                )

    def close(self) -> None:
        """End the backends' threads."""
        if self._team is not None:
            self._team.close()

    def backend_seconds(self) -> dict[str, float]:
        """Seconds that each of several backends has computed since the last call."""
        return {} if self._scheduled is None else self._scheduled.take_seconds()

    def forward(self, microbatch: int, x: Array) -> Floats | None:
        """Ids on the embedding stage, else hidden states; gives hidden states, or None on the
        head stage. Keeps what the microbatch's backward needs.
        """
        kept = self._kept[microbatch] = _Kept(ids=x if self._spec.embedding else None)
        x = self._enter(x)
        for block in self._weights.blocks:
            kept.inputs.append(x)
            x, saved = self._runner().forward(x, block, keep=self._spec.form == "saved")
            kept.saved.append(saved)
        if self._spec.head:
            kept.inputs.append(x)
            return None
        return x

    def _runner(self) -> BlockRunner:
        assert self._blocks is not None  # a stage with blocks has one
        return self._blocks

    def _enter(self, x: Array) -> Array:
        if not self._spec.embedding:
            return x
        group = self._weights.embedding
        return self._programs["embedding_forward"].run({"ids": x}, group.weights)["y"]

    def set_labels(self, microbatch: int, labels: Array, scale: float) -> None:
        """Head stage, before backward: labels (-100 does not count), and the factor of the
        summed loss, 1 / predicted positions of the whole batch.
        """
        self._labels[microbatch] = (labels, np.array(scale, np.float32))

    def backward(self, microbatch: int, dy: Floats | None) -> Floats | None:
        """Gradient of the loss by this stage's output (None on the head stage) to that by its
        input (None on the embedding stage). Adds to the weights' gradients.
        """
        kept = self._kept.pop(microbatch, None)
        if kept is None:
            raise WorkerError(f"backward of microbatch {microbatch} came before its forward")
        dx = self._head_backward(microbatch, kept.inputs.pop()) if self._spec.head else dy
        if dx is None:
            raise WorkerError("only the head stage starts a backward without a gradient")
        for block in reversed(self._weights.blocks):
            dx = self._runner().backward(dx, kept.inputs.pop(), kept.saved.pop(), block)
        if kept.ids is None:
            return dx
        if self._spec.training == "full":
            embedding_backward(dx, kept.ids, self._weights.embedding)
        return None

    def _head_backward(self, microbatch: int, x: Floats) -> Floats:
        labels, scale = self._labels.pop(microbatch)
        head = self._weights.head
        if self._split_head is not None:
            loss, dx = self._split_head.run(x, labels, scale, head)
            self._loss += loss
            return dx
        dx, wanted = np.empty_like(flat(x)), next_tokens(labels)
        work = HeadPass(self._head_chunk, flat(x), wanted, scale, dx, table_sum(head))
        work.run(self._programs["head_backward"], head.weights)
        head.add_gradients(work.gradients)
        self._loss += work.loss
        return dx.reshape(x.shape)

    def loss(self) -> float:
        """Head stage: the loss of this step's microbatches so far (already scaled)."""
        return self._loss

    def evaluate(
        self, x: Array, labels: Array | None
    ) -> tuple[Floats | None, tuple[float, int] | None]:
        """Forward only, nothing kept: hidden states, or on the head stage (summed negative
        log-likelihood in nats, number of predicted positions).
        """
        x = self._enter(x)
        for block in self._weights.blocks:
            x, _ = self._runner().forward(x, block, keep=False)
        if not self._spec.head:
            return x, None
        if labels is None:
            raise WorkerError("the head stage cannot evaluate without labels")
        wanted, weights = next_tokens(labels), self._weights.head.weights
        loss = head_loss(self._programs["head_loss"], self._head_chunk, flat(x), wanted, weights)
        return None, (loss, int((wanted != IGNORED_LABEL).sum()))

    def tied_gradient(self) -> Floats | None:
        """This end's gradient [V, D] of a trained tied table whose other end is elsewhere."""
        end = self._weights.tied_end()
        return None if end is None else end.accumulator()

    def add_tied_gradient(self, other: Floats, first_row: int = 0) -> None:
        """Add the other end's part, or some rows of it. Addition commutes, so both ends hold the
        same bits.
        """
        end = self._weights.tied_end()
        if end is not None:
            end.accumulator()[first_row : first_row + len(other)] += other

    def gradient_square_sum(self) -> float:
        """Over this stage's gradients; a tied table counts at the embedding stage only."""
        return self._weights.gradient_square_sum()

    def step(self, learning_rate: float, clip_coefficient: float) -> None:
        """AdamW with every gradient times `clip_coefficient`; starts the next step."""
        self._step += 1
        step = Step(self._step, learning_rate, clip_coefficient)
        self._weights.update(self._spec.optimizer, step, self._threads)
        self._loss = 0.0
        if self._scheduled is not None:
            self._scheduled.end_step()

    def states(self, parts: frozenset[Part]) -> Iterator[tuple[Source, tuple[Floats, ...]]]:
        """Trained tensors of some parts with their moments, each flat."""
        return self._weights.states(parts)

    def trained(self) -> Iterator[tuple[str, Floats]]:
        """Results under Hugging Face (lora: `peft`) names and layout, float32, C order."""
        return self._weights.results()

    def trained_parameters(self) -> int:
        """How many numbers the optimizer changes."""
        return self._weights.trained_parameters()

    def resident_bytes(self) -> dict[str, int]:
        """Memory by kind: weights, gradients, moments, kept (of microbatches in flight now)."""
        inputs = [a for kept in self._kept.values() for a in kept.inputs]
        saved = [s for kept in self._kept.values() for s in kept.saved if s is not None]
        held = sum(a.nbytes for a in inputs) + sum(s.bytes for s in saved)
        return self._weights.resident_bytes() | {"kept": held}
