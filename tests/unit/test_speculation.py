"""Guessing ahead: what is guessed, when, and that it changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.wire.sampling import Sampling
from confidantd.wire.worker import Decode, Token, Tokens
from confidantd.worker.speculation import (
    LONGEST_MATCH,
    LOOKED_BACK,
    MOST,
    PATIENCE,
    SHORTEST_MATCH,
    TRIES,
    WARM_PASSES,
    Feed,
    Lookup,
    Pace,
)
from tests.unit.reciting import END, VOCABULARY, Pipeline


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
    """How many of so many passes had guesses, in a text that seems to repeat itself."""
    guessing = 0
    for _ in range(LOOKED_BACK):
        pace.looked_back(MOST)
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


def test_a_text_without_repetition_has_no_guesses() -> None:
    """However cheap they would be: what was not tried is looked back at."""
    pace = Pace()
    for _ in range(100):
        pace.passed(0, 1, 1.0)
        assert pace.most() == 0
        pace.looked_back(1)
    for _ in range(8):
        pace.looked_back(2)
    assert pace.most() > 0


def test_what_a_guess_would_have_gained_is_known_without_it() -> None:
    """Two tokens would have come true, then none."""
    feed = Feed([1, 2, 3, 4, 1], 40, guesses=True, clock=lambda: 0.0)
    gains: list[int] = []
    feed._pace.looked_back = gains.append  # type: ignore[method-assign]
    for token in (2, 3, 4, 9):
        feed.take([token])
        assert feed.next(alone=True) == [token]
        feed.catch_up()
    assert gains == [3]


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
        feed.take(tokens)
        ids = feed.next(alone=True)
        left -= len(tokens)
        assert feed.past == past
        assert ids[0] == tokens[-1]
        assert len(ids) - 1 <= max(0, left - 1)
        if left <= 0:
            break
        feed.catch_up()
        accepted = ids[1:][:left]
        tokens = accepted or [1 + ids[0] % 3]
        past += len(tokens)
    assert left <= 2


def told(
    stages: int, rule: Callable[[Sequence[int]], int], prompt: list[int], count: int, **options: Any
) -> tuple[list[Token], Pipeline]:
    """The tokens of one text, by real generators over such stages."""

    async def run() -> tuple[list[Token], Pipeline]:
        tokens, ended = list[Token](), asyncio.Event()

        def hear(event: Tokens) -> None:
            tokens.extend(event.tokens)
            if event.tokens[-1].finished:
                ended.set()

        pipeline = Pipeline(stages, 1, rule, hear)
        pipeline.start(Decode(0, tuple(prompt), count, Sampling(), (END,), **options))
        await pipeline.run(ended.wait())
        return tokens, pipeline

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
    found, pipeline = told(2, lambda text: len(text) % 5, [1, 2], 200)
    assert sum(token.guessed for token in found) > 150
    assert len(pipeline.mails[0].sent) < 50
    _, pipeline = told(2, lambda text: len(text) % 5, [1, 2], 200, speculates=False)
    assert len(pipeline.mails[0].sent) == 200
