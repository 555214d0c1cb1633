"""One stage's share of generation: hidden states go down the pipeline, tokens come back.

Stage 0 says what is computed next (`Batching`); each stage answers whatever arrives; the head
stage chooses, reports and sends to stage 0 what it chose.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.generation.stage import GeneratingStage
from confidantd.engine.sampling import Sampler
from confidantd.engine.tensors import Floats
from confidantd.errors import ProtocolError
from confidantd.planner.memory import prefill_chunk
from confidantd.wire.frames import FrameKind
from confidantd.wire.passes import Pass
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Decode, Token, Tokens
from confidantd.worker.batching import Batching, Chosen
from confidantd.worker.exchange import Exchange

LITTLE_TOKENS = 16  # of a pass that may take little time
TELL_SECONDS = 0.02  # between two reports: a reader sees text come as smoothly
NO_TOKEN = -1  # behind those of a row that has fewer than another one


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
        report: Callable[[Tokens], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._place = place
        self._stage = stage
        self._told: list[Token] = []  # chosen, and not reported yet
        self._told_at = -math.inf
        self._telling: asyncio.TimerHandle | None = None
        self._exchange = exchange
        self._report = report
        self._sequences: dict[int, asyncio.Future[_Sequence]] = {}
        self._more, self._feeding = asyncio.Event(), False
        heads = place.spec.model.block.heads
        self._batching = Batching(
            place.stages, place.rows, lambda length: prefill_chunk(heads, length), clock
        )

    def start(self, command: Decode) -> None:
        """Take on a sequence."""
        if self._place.spec.head:
            sampler = Sampler(command.sampling, command.prompt, command.chosen)
            self._sequence(command.sequence).set_result(_Sequence(command, sampler))
        if self._place.spec.embedding:
            self._batching.add(command)
            self._more.set()

    def halt(self, sequence: int) -> None:
        """Generate no more of a sequence; on the stage with the embedding."""
        self._batching.halt(sequence)
        self._more.set()

    async def serve(self) -> None:
        """Feed, and answer frames from other stages, for ever."""
        async with asyncio.TaskGroup() as group:
            if self._place.spec.embedding:
                group.create_task(self._feed_new(), name="new")
                group.create_task(self._serve_tokens(), name="tokens")
            else:
                group.create_task(self._serve_hidden(), name="hidden")

    async def _feed_new(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            await self._feed()

    async def _feed(self, *, prompts: bool = True) -> None:
        """All that can be fed now; who does so already sees what was added meanwhile. Without
        pieces of `prompts` it takes little time, and leaves those to who has more.
        """
        if self._feeding:
            return
        self._feeding = True
        try:
            while (following := self._batching.next(prompts=prompts)) is not None:
                ids = np.array(following.ids, dtype=np.int64)
                found = await self._forward(following.number, following.of, ids)
                self._batching.meanwhile(following.number)
                if found is not None:  # the head is here, too
                    self._batching.chosen(following.number, found)
                    self._tell()
                    await asyncio.sleep(0)
        finally:
            self._feeding = False
        if not prompts:
            self._more.set()

    async def _serve_hidden(self) -> None:
        while True:
            frame, hidden = await self._exchange.next(FrameKind.HIDDEN)
            if frame.of is None:
                raise ProtocolError("a hidden state says not of which sequences it is")
            found = await self._forward(frame.step, frame.of, hidden)
            if found is not None:
                await self._exchange.send(0, FrameKind.TOKEN, frame.step, 0, _as_array(found))
                self._tell()

    async def _serve_tokens(self) -> None:
        while True:
            frame, array = await self._exchange.next(FrameKind.TOKEN)
            if frame.stage != self._place.stages - 1:
                raise ProtocolError("another stage than the head has chosen")
            self._batching.chosen(frame.step, _from_array(array))
            await self._feed(prompts=False)

    async def _forward(
        self, number: int, of: Pass, x: NDArray[np.generic]
    ) -> tuple[Chosen, ...] | None:
        """One pass of this stage over ids [b, T] or hidden states [b, T, D]. The head's gives what
        it chose.
        """
        of.check(x.shape)
        size = x.shape[0] * x.shape[1]
        if size <= LITTLE_TOKENS:
            y = await self._exchange.compute_little(size, self._compute, of, x)
        else:
            y = await self._exchange.compute(self._compute, of, x)
        if not self._place.spec.head:
            following = self._place.stage + 1
            await self._exchange.send(following, FrameKind.HIDDEN, number, 0, y, of=of)
            return None
        for sequence in of.stopped:
            self._sequences.pop(sequence, None)
        if not of.chooses:
            return tuple(Chosen((), ended=False) for _ in of.sequences)
        states = [await self._sequence(sequence) for sequence in of.sequences]
        return tuple(self._choose(s, row, of.guess) for s, row in zip(states, y, strict=True))

    def _tell(self) -> None:
        """The owner of what was chosen: after the next pass has begun elsewhere, and that of a few
        passes at once where they follow each other fast.
        """
        now = asyncio.get_running_loop().time()
        if self._told and (
            now - self._told_at >= TELL_SECONDS or any(token.finished for token in self._told)
        ):
            self._report(Tokens(tuple(self._told)))
            self._told, self._told_at = [], now
        elif self._told and (self._telling is None or self._telling.when() < now):
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _compute(self, of: Pass, x: NDArray[Any]) -> Floats:
        """Without what was guessed wrong before."""
        for sequence in of.dropped:
            self._stage.release(sequence)
        for begun in of.begun:
            self._stage.begin(begun.sequence, begun.source, begun.length, kept=begun.kept)
        for sequence, past in zip(of.sequences, of.past, strict=True):
            self._stage.truncate(sequence, past)
            if self._stage.length(sequence) != past:
                raise ProtocolError("a pass begins behind what there is of its sequence")
        return self._stage.forward(of.sequences, x, 1 + len(of.guess))

    def _sequence(self, sequence: int) -> asyncio.Future[_Sequence]:
        """The sequence, once its command is here: hidden states may overtake the command."""
        if sequence not in self._sequences:
            self._sequences[sequence] = asyncio.get_running_loop().create_future()
        return self._sequences[sequence]

    def _choose(
        self,
        sequence: _Sequence,
        logits: NDArray[np.float32],
        guess: tuple[int, ...],
    ) -> Chosen:
        """Pick tokens from logits [n, V] as long as they were guessed."""
        command, tokens, finished = sequence.command, list[int](), ""
        for index, row in enumerate(logits):
            choice = sequence.sampler.pick(row)
            sequence.produced += 1
            if choice.token in command.end_tokens:
                finished = "stop"
            elif sequence.produced >= command.max_new_tokens:
                finished = "length"
            guessed = index > 0  # by the row before
            more = (choice.token, finished, choice.logprob, choice.likeliest, guessed)
            self._told.append(Token(command.sequence, *more))
            tokens.append(choice.token)
            if finished or (index < len(guess) and choice.token != guess[index]):
                break
        if finished:
            del self._sequences[command.sequence]
        return Chosen(tuple(tokens), ended=bool(finished))


def _as_array(found: Sequence[Chosen]) -> NDArray[np.int64]:
    """[b, 1 + n]: whether each sequence has ended, and its tokens."""
    most = max(len(chosen.tokens) for chosen in found)
    array = np.full((len(found), 1 + most), NO_TOKEN, np.int64)
    for row, chosen in zip(array, found, strict=True):
        row[0] = chosen.ended
        row[1 : 1 + len(chosen.tokens)] = chosen.tokens
    return array


def _from_array(array: NDArray[Any]) -> tuple[Chosen, ...]:
    if array.ndim != 2 or array.shape[1] < 1:
        raise ProtocolError("tokens came in a wrong shape")
    return tuple(
        Chosen(tuple(int(token) for token in row[1:] if token >= 0), ended=bool(row[0]))
        for row in array
    )
