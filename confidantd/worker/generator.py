"""One stage's share of generation: hidden states go down the pipeline, tokens come back.

Stage 0 feeds the prompt and then every chosen token; each stage answers whatever
arrives; the head stage chooses the token, reports it and sends it to stage 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.generation.stage import GeneratingStage
from confidantd.engine.sampling import Sampler
from confidantd.planner.memory import prefill_chunk
from confidantd.wire.frames import FrameKind
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Decode, Token
from confidantd.worker.exchange import Exchange


@dataclass(slots=True)
class _Sequence:
    """What the head stage knows of a sequence."""

    command: Decode
    sampler: Sampler
    produced: int = 0


class Generator:
    """Serves generation on one stage until it is cancelled."""

    def __init__(
        self,
        place: StageAssignment,
        stage: GeneratingStage,
        exchange: Exchange,
        report: Callable[[Token], None],
    ) -> None:
        self._place = place
        self._stage = stage
        self._exchange = exchange
        self._report = report
        self._sequences: dict[int, asyncio.Future[_Sequence]] = {}

    async def start(self, command: Decode) -> None:
        """Take on a sequence; stage 0 runs its prompt through the pipeline."""
        sampler = Sampler(command.sampling, command.prompt, command.chosen)
        self._sequence(command.sequence).set_result(_Sequence(command, sampler))
        if self._place.spec.embedding:
            prompt = np.array([command.prompt], dtype=np.int64)
            length = prompt.shape[1]
            size = prefill_chunk(self._place.spec.model.block.heads, length)
            for start in range(0, length, size):
                chunk = prompt[:, start : start + size]
                last = start + size >= length
                await self._forward(command.sequence, chunk, last=last)

    async def serve(self) -> None:
        """Answer frames from other stages, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_hidden(), name="hidden")
            group.create_task(self._serve_tokens(), name="tokens")

    async def _serve_hidden(self) -> None:
        while True:
            frame, hidden = await self._exchange.next(FrameKind.HIDDEN)
            await self._forward(frame.step, hidden, last=bool(frame.microbatch))

    async def _serve_tokens(self) -> None:
        while True:
            frame, token = await self._exchange.next(FrameKind.TOKEN)
            await self._forward(frame.step, token.astype(np.int64).reshape(1, 1), last=True)

    async def _forward(self, sequence: int, x: NDArray[np.generic], *, last: bool) -> None:
        """One step of this stage; `last` says that the head shall choose a token after it."""
        y = await self._exchange.compute(self._stage.forward, [sequence], x)
        if not self._place.spec.head:
            target = self._place.stage + 1
            await self._exchange.send(target, FrameKind.HIDDEN, sequence, int(last), y)
        elif last:
            await self._choose(await self._sequence(sequence), y[0])

    def _sequence(self, sequence: int) -> asyncio.Future[_Sequence]:
        """The sequence, once its command is here: hidden states may overtake the command."""
        if sequence not in self._sequences:
            self._sequences[sequence] = asyncio.get_running_loop().create_future()
        return self._sequences[sequence]

    async def _choose(self, sequence: _Sequence, logits: NDArray[np.float32]) -> None:
        """Pick the next token, report it, and feed it back unless the sequence ends."""
        command = sequence.command
        while True:
            choice = sequence.sampler.pick(logits)
            token = choice.token
            sequence.produced += 1
            finished = ""
            if token in command.end_tokens:
                finished = "stop"
            elif sequence.produced >= command.max_new_tokens:
                finished = "length"
            self._report(Token(command.sequence, token, finished, choice.logprob, choice.likeliest))
            if finished:
                return
            if not self._place.spec.embedding:
                data = np.array([token], dtype=np.int64)
                await self._exchange.send(0, FrameKind.TOKEN, command.sequence, 0, data)
                return
            fed = np.array([[token]], dtype=np.int64)
            found = await self._exchange.compute(self._stage.forward, [command.sequence], fed)
            logits = found[0]
