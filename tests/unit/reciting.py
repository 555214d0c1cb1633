"""Generators of several stages in one process, whose stages continue texts by a rule."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.ids import DeviceId, JobId
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.wire.frames import Frame, FrameKind
from confidantd.wire.passes import Pass
from confidantd.wire.stage import StageAssignment, StageSpec
from confidantd.wire.worker import Decode, Tokens
from confidantd.worker.generator import Generator
from tests.unit.model_files import LLAMA

VOCABULARY, END = 11, 10
MODEL = spec_from_config(Config({**LLAMA, "vocab_size": VOCABULARY}, "config.json"))
Rule = Callable[[Sequence[int]], int]


class Mail:
    """What one stage is sent by others; work is done at once."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.others: dict[int, Mail] = {}
        self._queues = {kind: asyncio.Queue[Any]() for kind in FrameKind}
        self.sent: list[Frame] = []

    async def compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Others have their turn first, as they do while a thread computes."""
        await asyncio.sleep(0)
        return work(*arguments)

    async def compute_little(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """Others have their turn here, too."""
        assert size > 0
        return await self.compute(work, *arguments)

    async def send(
        self, stage: int, kind: FrameKind, step: int, microbatch: int, array: NDArray[Any],
        *, of: Pass | None = None,
    ) -> None:  # fmt: skip
        """Into the other's box."""
        frame = Frame(JobId("j"), 1, kind, self.stage, step, microbatch, of=of)
        self.sent.append(frame)
        self.others[stage]._queues[kind].put_nowait((frame, array))

    async def next(self, kind: FrameKind) -> tuple[Frame, NDArray[Any]]:
        """From this one's box."""
        frame, array = await self._queues[kind].get()
        return frame, array


class Reciting:
    """A stage that passes ids on, or, as the head, continues each text by a rule of all of it.

    It keeps what a real one keeps, and takes nothing that a real one would not take.
    """

    def __init__(self, head: bool, rows: int, rule: Rule) -> None:
        self._head, self._rows, self._rule = head, rows, rule
        self.texts: dict[int, list[int]] = {}
        self.fed = 0
        self.batches: list[int] = []

    def forward(self, sequences: Sequence[int], x: NDArray[Any], rows: int = 1) -> NDArray[Any]:
        """Ids [b, T, 1], or logits [b, rows, V] that are certain."""
        tokens = np.asarray(x).reshape(len(sequences), -1)
        assert len(sequences) == 1 or tokens.shape[1] == 1
        self.batches.append(len(sequences))
        self.fed += tokens.size
        for sequence, new in zip(sequences, tokens, strict=True):
            self.texts.setdefault(sequence, []).extend(int(token) for token in new)
        assert len(self.texts) <= self._rows
        if not self._head:
            return tokens.astype(np.float32)[:, :, None]
        logits = np.zeros((len(sequences), rows, VOCABULARY), np.float32)
        for i, sequence in enumerate(sequences):
            text = self.texts[sequence]
            for row in range(rows):
                logits[i, row, self._rule(text[: len(text) - rows + row + 1])] = 9.0
        return logits

    def begin(self, sequence: int, source: int, length: int, *, kept: bool) -> None:
        """With what another one has."""
        text = self.texts[source]
        assert sequence not in self.texts
        assert 0 < length <= len(text)
        self.texts[sequence] = text[:length]
        if not kept:
            del self.texts[source]

    def truncate(self, sequence: int, length: int) -> None:
        """Nothing may be missing before it."""
        assert length <= len(self.texts.setdefault(sequence, []))
        del self.texts[sequence][length:]

    def length(self, sequence: int) -> int:
        """Of its text here."""
        return len(self.texts.get(sequence, ()))

    def release(self, sequence: int) -> None:
        """One that is there."""
        del self.texts[sequence]


class Pipeline:
    """Generators over such stages; `client` asks them for texts, then they are ended."""

    def __init__(self, stages: int, rows: int, rule: Rule, hear: Callable[[Tokens], None]) -> None:
        self.mails = [Mail(index) for index in range(stages)]
        self.stages = [Reciting(i == stages - 1, rows, rule) for i in range(stages)]
        self.generators = []
        for index, (mail, reciting) in enumerate(zip(self.mails, self.stages, strict=True)):
            mail.others = dict(enumerate(self.mails))
            ends = {"embedding": index == 0, "head": index == stages - 1}
            spec = StageSpec(MODEL, index, index + 1, training=None, **ends)
            place = StageAssignment(
                JobId("j"), 1, index, stages, 1, spec, DeviceId("d"), {}, (), rows=rows
            )
            stage: Any = reciting
            exchange: Any = mail
            clock = itertools.count().__next__  # any pass takes one tick
            self.generators.append(Generator(place, stage, exchange, hear, clock))

    def start(self, command: Decode) -> None:
        """As the owner does: the head hears of it first."""
        for generator in {id(g): g for g in (self.generators[-1], self.generators[0])}.values():
            generator.start(command)

    def halt(self, sequence: int) -> None:
        """Stage 0 hears of it."""
        self.generators[0].halt(sequence)

    async def run(self, client: Awaitable[None]) -> None:
        """Until the client has ended."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(g.serve()) for g in self.generators]
            async with asyncio.timeout(20):
                await client
            for task in tasks:
                task.cancel()
