"""Guessing ahead: what is guessed, when, and that it changes nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confidantd.ids import DeviceId, JobId
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.wire.frames import Frame, FrameKind
from confidantd.wire.sampling import Sampling
from confidantd.wire.stage import StageAssignment, StageSpec
from confidantd.wire.worker import Decode, Token
from confidantd.worker.generator import Generator
from confidantd.worker.speculation import (
    LONGEST_MATCH,
    MOST,
    PATIENCE,
    SHORTEST_MATCH,
    TRIES,
    WARM_PASSES,
    Feed,
    Lookup,
    Pace,
)
from tests.unit.model_files import LLAMA

VOCABULARY, END = 11, 10
MODEL = spec_from_config(Config({**LLAMA, "vocab_size": VOCABULARY}, "config.json"))


def naive(tokens: list[int], most: int) -> list[int]:
    """What followed the longest run that the text ends with, where it stood last before."""
    for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
        for begin in range(len(tokens) - 1, length - 1, -1):
            if tokens[begin - length : begin] == tokens[-length:]:
                return tokens[begin : begin + most]
    return []


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 60), st.integers(1, 5))
def test_what_followed_the_same_run_is_guessed(tokens: list[int], cut: int, most: int) -> None:
    """However the text came in pieces."""
    lookup = Lookup(tokens[:cut])
    lookup.add(tokens[cut:])
    assert lookup.guess(most) == naive(tokens, most)


def passes(pace: Pace, count: int, seconds: Callable[[int], float], gain: int) -> int:
    """How many of so many passes had guesses."""
    guessing = 0
    for _ in range(count):
        most = pace.most()
        guessing += most > 0
        pace.passed(most, min(gain, most + 1) if most else 1, seconds(most))
    return guessing


def test_guesses_that_pay_go_on() -> None:
    """Four tokens in twice the time."""
    found = passes(Pace(), 100, lambda guessed: 2.0 if guessed else 1.0, 4)
    assert found == 100 - WARM_PASSES


@pytest.mark.parametrize("gain", [1, 2])
def test_guesses_that_do_not_pay_are_rare(gain: int) -> None:
    """Tried again after a while, each time after a longer one."""
    found = passes(Pace(), 1000, lambda guessed: 2.5 if guessed else 1.0, gain)
    assert TRIES <= found <= 6 * TRIES
    first = passes(Pace(), WARM_PASSES + TRIES + PATIENCE, lambda guessed: 1.0 + guessed, 1)
    assert first == TRIES


def test_guesses_grow_while_they_come_true() -> None:
    pace = Pace()
    passes(pace, WARM_PASSES, lambda _: 1.0, 1)
    passes(pace, 10, lambda _: 1.0, MOST + 1)
    assert pace.most() == MOST


def test_a_feed_counts_positions_and_never_asks_for_more_than_is_left() -> None:
    """The input after n tokens is the last of them, behind those that are in the cache."""
    clock = iter(range(1000))
    feed = Feed([1, 2, 3, 1, 2], 40, guesses=True, clock=lambda: float(next(clock)))
    past, left, tokens = 5, 40, [3]
    for _ in range(20):
        ids, at = feed.next(tokens)
        left -= len(tokens)
        assert at == past
        assert ids[0] == tokens[-1]
        assert len(ids) - 1 <= max(0, left - 1)
        if left <= 0:
            break
        accepted = ids[1:][:left]
        tokens = accepted or [1 + ids[0] % 3]
        past += len(tokens)
    assert left <= 2


class Mail:
    """Two stages that send each other arrays; work is done at once."""

    def __init__(self) -> None:
        self.others: dict[int, Mail] = {}
        self._queues = {kind: asyncio.Queue[Any]() for kind in FrameKind}
        self.sent: list[Frame] = []

    async def compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """At once."""
        return work(*arguments)

    async def send(
        self, stage: int, kind: FrameKind, step: int, microbatch: int, array: NDArray[Any],
        *, past: int = 0, guess: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Into the other's box."""
        frame = Frame(JobId("j"), 1, kind, 0, step, microbatch, past=past, guess=guess)
        self.sent.append(frame)
        self.others[stage]._queues[kind].put_nowait((frame, array))

    async def next(self, kind: FrameKind) -> tuple[Frame, NDArray[Any]]:
        """From this one's box."""
        frame, array = await self._queues[kind].get()
        return frame, array


class Reciting:
    """A stage that passes ids on, or, as the head, continues a text by a rule of all before."""

    def __init__(self, head: bool, rule: Callable[[Sequence[int]], int]) -> None:
        self._head, self._rule = head, rule
        self.ids: list[int] = []

    def forward(self, sequences: Sequence[int], x: NDArray[Any], rows: int = 1) -> NDArray[Any]:
        """Logits that are certain."""
        assert list(sequences) == [0]
        new = [int(value) for value in np.asarray(x).reshape(-1)]
        self.ids += new
        if not self._head:
            return np.array(new, np.float32).reshape(1, -1, 1)
        logits = np.zeros((1, rows, VOCABULARY), np.float32)
        for row in range(rows):
            logits[0, row, self._rule(self.ids[: len(self.ids) - rows + row + 1])] = 9.0
        return logits

    def truncate(self, sequence: int, length: int) -> None:
        """Nothing may be missing before it."""
        assert sequence == 0
        assert length <= len(self.ids)
        del self.ids[length:]

    def release(self, sequence: int) -> None:
        """It goes with the test."""

    def resident_bytes(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing."""


def told(
    stages: int, rule: Callable[[Sequence[int]], int], prompt: list[int], count: int, **options: Any
) -> tuple[list[Token], list[Mail]]:
    """The tokens of real generators over such stages."""

    async def run() -> tuple[list[Token], list[Mail]]:
        tokens, ended = list[Token](), asyncio.Event()

        def hear(token: Token) -> None:
            tokens.append(token)
            if token.finished:
                ended.set()

        mails = [Mail() for _ in range(stages)]
        command = Decode(0, tuple(prompt), count, Sampling(), (END,), **options)
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index, mail in enumerate(mails):
                mail.others = dict(enumerate(mails))
                ends = {"embedding": index == 0, "head": index == stages - 1}
                spec = StageSpec(MODEL, index, index + 1, training=None, **ends)
                place = StageAssignment(
                    JobId("j"), 1, index, stages, 1, spec, DeviceId("d"), {}, ()
                )
                stage: Any = Reciting(ends["head"], rule)
                exchange: Any = mail
                ticks = itertools.count()
                clock = ticks.__next__  # any pass takes one tick
                generator = Generator(place, stage, exchange, hear, clock)
                tasks.append(group.create_task(generator.serve()))
                if ends["embedding"] or ends["head"]:
                    tasks.append(group.create_task(generator.start(command)))
            async with asyncio.timeout(20):
                await ended.wait()
            for task in tasks:
                task.cancel()
        return tokens, mails

    return asyncio.run(run())


@settings(max_examples=15, deadline=None)
@given(
    stages=st.integers(1, 3),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    count=st.integers(1, 60),
    period=st.integers(1, 9),
    noise=st.integers(0, 5),
)
def test_guessing_changes_no_token(
    stages: int, prompt: list[int], count: int, period: int, noise: int
) -> None:
    """A text that repeats itself, but now and then does not; it may end by itself."""

    def rule(text: Sequence[int]) -> int:
        if noise and len(text) % (7 * noise) == 0:
            return (text[-1] + len(text)) % VOCABULARY
        return (len(text) % period) % VOCABULARY

    text, wanted = list(prompt), list[int]()
    while len(wanted) < count and (not wanted or wanted[-1] != END):
        wanted.append(rule(text))
        text.append(wanted[-1])
    found, _ = told(stages, rule, prompt, count)
    assert [token.token for token in found] == wanted
    assert found[-1].finished == ("stop" if wanted[-1] == END else "length")
    plain, _ = told(stages, rule, prompt, count, speculates=False)
    assert [token.token for token in plain] == wanted
    assert not any(token.guessed for token in plain)


def test_fewer_passes_where_a_text_repeats_itself() -> None:
    """Most tokens need none of their own."""
    found, mails = told(2, lambda text: len(text) % 5, [1, 2], 200)
    assert sum(token.guessed for token in found) > 150
    assert len(mails[0].sent) < 50
    _, mails = told(2, lambda text: len(text) % 5, [1, 2], 200, speculates=False)
    assert len(mails[0].sent) == 200
