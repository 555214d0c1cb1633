"""One stage's share of a training step: interprets the schedule over the links."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.train_stage import TrainStage
from confidantd.schedule.one_f_one_b import Action, ActionKind, actions, forward_actions
from confidantd.wire.frames import FrameKind
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Evaluate, Evaluated, StepDone, StepSpan, TrainStep
from confidantd.worker.exchange import Exchange
from confidantd.worker.memory import peak_memory_bytes
from confidantd.worker.tied import join_tied_gradients, tied_partner

COMPUTED: Mapping[ActionKind, Literal["forward", "backward"]] = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
}
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class Trainer:
    """Runs training and evaluation steps of one stage, one after the other."""

    def __init__(self, assignment: StageAssignment, stage: TrainStage, exchange: Exchange) -> None:
        self.place = assignment
        self._stage = stage
        self._exchange = exchange
        self._tied_partner = tied_partner(assignment)

    async def step(self, command: TrainStep) -> StepDone:
        """Forward and backward of every microbatch, then one optimizer step."""
        started, self._exchange.busy_seconds = time.perf_counter(), 0.0
        place = self.place
        labels = self._batch(command.labels)
        for microbatch in range(len(labels)):
            self._stage.set_labels(microbatch, labels[microbatch], command.scale)
        tokens = self._batch(command.tokens)
        one_pass = TrainPass(place, self._stage, self._exchange, command.step, tokens)
        spans: list[StepSpan] = []
        for action in actions(place.stage, place.stages, place.microbatches):
            if action.kind is not ActionKind.STEP:  # `_update` needs the whole pipeline
                await one_pass.run(action)
            if action.kind in COMPUTED:
                began, ended = (at - started for at in self._exchange.last)
                spans.append(StepSpan(COMPUTED[action.kind], action.microbatch, began, ended))
        loss = self._stage.loss() if place.spec.head else None
        began = time.perf_counter() - started
        norm = await self._update(command)
        spans.append(StepSpan("step", 0, began, time.perf_counter() - started))
        return StepDone(
            step=command.step,
            loss=loss,
            gradient_norm=norm if place.stage == 0 else None,
            busy_seconds=self._exchange.busy_seconds,
            wall_seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            backend_seconds=self._stage.backend_seconds(),
            spans=tuple(spans),
        )

    async def evaluate(self, command: Evaluate) -> Evaluated | None:
        """Forward only; the head stage answers with the summed loss."""
        place = self.place
        tokens = self._batch(command.tokens)
        # steps of evaluations count down from -1, so that no frame is taken for a training one
        one_pass = EvaluatePass(place, self._stage, self._exchange, -1 - command.request, tokens)
        one_pass.labels = self._batch(command.labels)
        for action in forward_actions(place.stage, place.stages, command.microbatches):
            await one_pass.run(action)
        if not place.spec.head:
            return None
        return Evaluated(command.request, one_pass.loss_sum, one_pass.count)

    async def _update(self, command: TrainStep) -> float:
        """Join tied gradients, agree on the global norm, clip and step; gives the norm."""
        await self._join_tied_gradients(command.step)
        norm = float(np.sqrt(await self._global_square_sum(command.step)))
        clip = 1.0
        if command.max_grad_norm > 0:
            clip = min(1.0, command.max_grad_norm / (norm + CLIP_EPSILON))
        await self._exchange.compute(self._stage.step, command.learning_rate, clip)
        return norm

    async def _join_tied_gradients(self, step: int) -> None:
        partner = self._tied_partner
        if partner is None:
            return
        await join_tied_gradients(self._stage, self._exchange, partner, step)

    async def _global_square_sum(self, step: int) -> float:
        """Partial sums travel from the last stage to stage 0, the total travels back."""
        index, last = self.place.stage, self.place.stages - 1
        exchange = self._exchange
        total = np.array(await exchange.compute(self._stage.gradient_square_sum), np.float64)
        if index < last:
            total = total + await exchange.receive(FrameKind.SQUARE_SUM, step, 0)
        if index > 0:
            await exchange.send(index - 1, FrameKind.SQUARE_SUM, step, 0, total)
            total = await exchange.receive(FrameKind.SQUARE_TOTAL, step, 0)
        if index < last:
            await exchange.send(index + 1, FrameKind.SQUARE_TOTAL, step, 0, total)
        return float(total)

    def _batch(self, data: bytes) -> NDArray[np.int64]:
        """Ids [M, b, S]; M is 0 where this stage got none."""
        spec = self.place.spec
        ids = np.frombuffer(data, dtype="<i4").astype(np.int64)
        rows = spec.microbatch_size * spec.sequence_length
        return ids.reshape(ids.size // rows, spec.microbatch_size, spec.sequence_length)


class TrainPass:
    """The actions of one step over one batch, and the arrays between them."""

    def __init__(
        self,
        place: StageAssignment,
        stage: TrainStage,
        exchange: Exchange,
        step: int,
        tokens: NDArray[np.int64],
    ) -> None:
        self.place = place
        self.stage = stage
        self.exchange = exchange
        self.step = step
        self.tokens = tokens
        self._arrays: dict[tuple[ActionKind, int], NDArray[Any] | None] = {}

    async def run(self, action: Action) -> None:
        """Interpret one action."""
        microbatch = action.microbatch
        match action.kind:
            case ActionKind.RECV_ACTIVATION:
                await self._receive(FrameKind.ACTIVATION, action)
            case ActionKind.FORWARD:
                received = self._arrays.pop((ActionKind.RECV_ACTIVATION, microbatch), None)
                x = self.tokens[microbatch] if received is None else received
                self._arrays[action.kind, microbatch] = await self.forward(microbatch, x)
            case ActionKind.SEND_ACTIVATION:
                await self._send(FrameKind.ACTIVATION, ActionKind.FORWARD, microbatch, 1)
            case ActionKind.RECV_GRADIENT:
                await self._receive(FrameKind.GRADIENT, action)
            case ActionKind.BACKWARD:
                dy = self._arrays.pop((ActionKind.RECV_GRADIENT, microbatch), None)
                dx = await self.exchange.compute(self.stage.backward, microbatch, dy)
                self._arrays[action.kind, microbatch] = dx
            case ActionKind.SEND_GRADIENT:
                await self._send(FrameKind.GRADIENT, ActionKind.BACKWARD, microbatch, -1)
            case ActionKind.STEP:
                raise AssertionError("the optimizer step is not part of a pass")

    async def forward(self, microbatch: int, x: NDArray[Any]) -> NDArray[Any] | None:
        """Forward of one microbatch: [b, S, D], None on the head stage."""
        return await self.exchange.compute(self.stage.forward, microbatch, x)

    async def _receive(self, kind: FrameKind, action: Action) -> None:
        array = await self.exchange.receive(kind, self.step, action.microbatch)
        self._arrays[action.kind, action.microbatch] = array

    async def _send(
        self, kind: FrameKind, made_by: ActionKind, microbatch: int, direction: int
    ) -> None:
        array = self._arrays.pop((made_by, microbatch))
        assert array is not None
        target = self.place.stage + direction
        await self.exchange.send(target, kind, self.step, microbatch, array)


class EvaluatePass(TrainPass):
    """Forward only, summing the loss on the head stage; nothing is kept for a backward."""

    labels: NDArray[np.int64]
    loss_sum = 0.0
    count = 0

    async def forward(self, microbatch: int, x: NDArray[Any]) -> NDArray[Any] | None:
        """Forward of one microbatch; adds its loss on the head stage."""
        labels = self.labels[microbatch] if self.place.spec.head else None
        y, loss = await self.exchange.compute(self.stage.evaluate, x, labels)
        if loss is not None:
            self.loss_sum += loss[0]
            self.count += loss[1]
        return y
