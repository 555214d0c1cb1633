"""One stage's share of generation: hidden states go down the pipeline, tokens come back.

Stage 0 feeds the prompt and then every chosen token, perhaps with guesses behind it; each stage
answers whatever arrives; the head stage chooses, reports and sends to stage 0 what it chose.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.generation.stage import GeneratingStage
from confidantd.engine.sampling import Sampler
from confidantd.engine.tensors import Floats
from confidantd.errors import ProtocolError
from confidantd.planner.memory import prefill_chunk
from confidantd.wire.frames import FrameKind
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Decode, Token
from confidantd.worker.exchange import Exchange
from confidantd.worker.speculation import Feed


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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._place = place
        self._clock = clock
        self._stage = stage
        self._exchange = exchange
        self._report = report
        self._sequences: dict[int, asyncio.Future[_Sequence]] = {}
        self._feeds: dict[int, Feed] = {}

    async def start(self, command: Decode) -> None:
        """Take on a sequence; stage 0 runs its prompt through the pipeline."""
        sampler = Sampler(command.sampling, command.prompt, command.chosen)
        self._sequence(command.sequence).set_result(_Sequence(command, sampler))
        if self._place.spec.embedding:
            self._feeds[command.sequence] = Feed(
                command.prompt,
                command.max_new_tokens,
                guesses=command.speculates,
                clock=self._clock,
            )
            await self._prompt(command)

    async def _prompt(self, command: Decode) -> None:
        length, tokens = len(command.prompt), list[int]()
        size = prefill_chunk(self._place.spec.model.block.heads, length)
        for start in range(0, length, size):
            chunk = command.prompt[start : start + size]
            last = start + size >= length
            ids = np.array([chunk], dtype=np.int64)
            tokens = await self._forward(command.sequence, ids, start, (), last=last)
        while tokens:  # where the head is here, too
            tokens = await self._feed(command.sequence, tokens)

    async def _feed(self, sequence: int, tokens: list[int]) -> list[int]:
        """Go on after these tokens were chosen; gives the next ones if the head is here."""
        ids, past = self._feeds[sequence].next(tokens)
        x = np.array([ids], dtype=np.int64)
        return await self._forward(sequence, x, past, tuple(ids[1:]), last=True)

    async def serve(self) -> None:
        """Answer frames from other stages, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_hidden(), name="hidden")
            group.create_task(self._serve_tokens(), name="tokens")

    async def _serve_hidden(self) -> None:
        while True:
            frame, hidden = await self._exchange.next(FrameKind.HIDDEN)
            last = bool(frame.microbatch)
            tokens = await self._forward(frame.step, hidden, frame.past, frame.guess, last=last)
            if tokens:
                data = np.array(tokens, dtype=np.int64)
                await self._exchange.send(0, FrameKind.TOKEN, frame.step, 0, data)

    async def _serve_tokens(self) -> None:
        while True:
            frame, tokens = await self._exchange.next(FrameKind.TOKEN)
            if frame.step not in self._feeds or not tokens.size:
                raise ProtocolError("tokens came of a sequence that was not begun here")
            await self._feed(frame.step, [int(token) for token in tokens.reshape(-1)])

    async def _forward(
        self,
        sequence: int,
        x: NDArray[np.generic],
        past: int,
        guess: tuple[int, ...],
        *,
        last: bool,
    ) -> list[int]:
        """One pass of this stage over tokens from position `past` on, the last of which are a
        `guess`; `last` says that the head shall choose after it. Gives what it chose.
        """
        if x.ndim < 2 or x.shape[1] <= len(guess):
            raise ProtocolError("a pass has no token before its guesses")
        y = await self._exchange.compute(self._compute, sequence, x, past, 1 + len(guess))
        if not self._place.spec.head:
            await self._exchange.send(
                self._place.stage + 1, FrameKind.HIDDEN, sequence, int(last), y,
                past=past, guess=guess,
            )  # fmt: skip
            return []
        return self._choose(await self._sequence(sequence), y[0], guess) if last else []

    def _compute(self, sequence: int, x: NDArray[np.generic], past: int, rows: int) -> Floats:
        """Without what was guessed wrong before."""
        self._stage.truncate(sequence, past)
        return self._stage.forward([sequence], x, rows)

    def _sequence(self, sequence: int) -> asyncio.Future[_Sequence]:
        """The sequence, once its command is here: hidden states may overtake the command."""
        if sequence not in self._sequences:
            self._sequences[sequence] = asyncio.get_running_loop().create_future()
        return self._sequences[sequence]

    def _choose(
        self, sequence: _Sequence, logits: NDArray[np.float32], guess: tuple[int, ...]
    ) -> list[int]:
        """Pick tokens from logits [n, V] as long as they were guessed, and report them; none if
        the sequence has ended.
        """
        command, tokens = sequence.command, list[int]()
        for index, row in enumerate(logits):
            choice = sequence.sampler.pick(row)
            sequence.produced += 1
            finished = ""
            if choice.token in command.end_tokens:
                finished = "stop"
            elif sequence.produced >= command.max_new_tokens:
                finished = "length"
            guessed = index > 0  # by the row before
            told = (choice.token, finished, choice.logprob, choice.likeliest, guessed)
            self._report(Token(command.sequence, *told))
            if finished:
                return []
            tokens.append(choice.token)
            if index < len(guess) and choice.token != guess[index]:
                break
        return tokens
