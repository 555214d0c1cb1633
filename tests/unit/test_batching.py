"""Many texts at once: each is as if it were alone, and the stages are kept busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import ProtocolError
from confidantd.planner.memory import prefill_chunk
from confidantd.wire.sampling import Sampling
from confidantd.wire.worker import Decode, Tokens
from confidantd.worker.batching import LEAST_SHARED, Batching, Chosen
from tests.unit.reciting import END, VOCABULARY, Pipeline


def rule(text: Sequence[int]) -> int:
    """Depends on all of a text; sometimes it ends."""
    return sum((i + 3) * token for i, token in enumerate(text[-9:], len(text))) % VOCABULARY


def alone(prompt: Sequence[int], count: int) -> list[int]:
    """What a text is continued with."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(rule(text))
        if text[-1] == END:
            break
    return text[len(prompt) :]


class Client:
    """Asks for texts, and hears what comes."""

    def __init__(self, stages: int, rows: int) -> None:
        self.pipeline = Pipeline(stages, rows, rule, self._hear)
        self.found: dict[int, list[int]] = {}
        self.ended: dict[int, asyncio.Event] = {}
        self.halted: set[int] = set()
        self.heard = 0
        self.after_each: Callable[[], None] = lambda: None

    def _hear(self, event: Tokens) -> None:
        for token in event.tokens:
            if token.sequence not in self.halted:
                assert not self.ended[token.sequence].is_set(), "a text went on after its end"
                self.found[token.sequence].append(token.token)
                if token.finished:
                    self.ended[token.sequence].set()
            self.heard += 1
            self.after_each()

    def ask(
        self, sequence: int, prompt: Sequence[int], count: int, end: int = END, **options: bool
    ) -> None:
        """For one text."""
        self.found[sequence], self.ended[sequence] = [], asyncio.Event()
        self.pipeline.start(Decode(sequence, tuple(prompt), count, Sampling(), (end,), **options))

    def halt(self, sequence: int) -> None:
        """One that was asked for."""
        self.halted.add(sequence)
        self.pipeline.halt(sequence)
        self.ended[sequence].set()

    async def all_ended(self, sequences: Sequence[int]) -> None:
        """Until these have."""
        for sequence in sequences:
            await self.ended[sequence].wait()


def prompts(beginnings: int = 3) -> st.SearchStrategy[list[int]]:
    """Of which many begin alike."""
    begins = st.integers(0, beginnings).map(lambda n: [n + i % (n + 2) for i in range(20 * n)])
    rest = st.lists(st.integers(0, 9), min_size=1, max_size=8)
    return st.builds(lambda begin, end: begin + end, begins, rest)


@settings(max_examples=60, deadline=None)
@given(
    stages=st.integers(1, 3),
    rows=st.integers(1, 6),
    asked=st.lists(
        st.tuples(prompts(), st.integers(1, 25), st.integers(0, 30), st.booleans()),
        min_size=1,
        max_size=12,
    ),
)
def test_every_text_is_as_if_it_were_alone(
    stages: int, rows: int, asked: list[tuple[list[int], int, int, bool]]
) -> None:
    """They come in the middle of others, guess or not, begin alike or not; some are halted after
    so many tokens of any.
    """

    async def run() -> None:
        client, waiting = Client(stages, rows), list(enumerate(asked))
        halted = {i: after for i, (_, _, after, stops) in enumerate(asked) if stops}

        def begin() -> None:
            sequence, (prompt, count, _, _) = waiting.pop(0)
            client.ask(sequence, prompt, count, speculates=sequence % 2 == 0)

        def more() -> None:
            if waiting and client.heard % 3 == 0:
                begin()
            for sequence in [s for s, after in halted.items() if after <= client.heard]:
                if sequence in client.ended and not client.ended[sequence].is_set():
                    del halted[sequence]
                    client.halt(sequence)

        async def work() -> None:
            while waiting:
                begin()
                await client.all_ended(list(client.ended))
            await client.all_ended(range(len(asked)))

        client.after_each = more
        await client.pipeline.run(work())
        head = client.pipeline.generators[-1]
        assert not head._sequences.keys() - client.halted, "the head forgets what has ended"
        wanted = {s: alone(prompt, count) for s, (prompt, count, _, _) in enumerate(asked)}
        assert {s: client.found[s] for s in wanted.keys() - client.halted} == {
            s: wanted[s] for s in wanted.keys() - client.halted
        }

    asyncio.run(run())


def test_stages_compute_batches_side_by_side() -> None:
    """Eight texts over two stages: two batches of four."""

    async def run() -> list[int]:
        client = Client(2, 8)

        async def work() -> None:
            for sequence in range(8):
                client.ask(sequence, [sequence, 1, 1], 40, VOCABULARY, speculates=False)
            await client.all_ended(range(8))

        await client.pipeline.run(work())
        return client.pipeline.stages[1].batches

    batches = asyncio.run(run())
    assert max(batches) == 4
    assert batches.count(4) > 40


def fed_again(rows: int, turns: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens the first stage was fed for each prompt, with one new token each."""

    async def run() -> list[int]:
        client, found = Client(2, rows), list[int]()

        async def work() -> None:
            for sequence, prompt in enumerate(turns):
                before = client.pipeline.stages[0].fed
                client.ask(sequence, prompt, 1)
                await client.all_ended([sequence])
                found.append(client.pipeline.stages[0].fed - before)

        await client.pipeline.run(work())
        return found

    return asyncio.run(run())


def test_what_is_in_the_caches_is_not_computed_again() -> None:
    long, other = [1, 2, 3, 4] * 50, [5, 6, 7] * 50
    assert fed_again(2, [long, [*long, 1, 2], [*long, 1, 2, 3, 4]]) == [200, 2, 2]
    assert fed_again(2, [long, long]) == [200, 1]  # one token must be fed
    assert fed_again(2, [long, other, [*long, 1], [*other, 1]]) == [200, 150, 1, 1]
    assert fed_again(1, [long, other, [*long, 1]]) == [200, 150, 201]  # no row for both
    branch = [*long[:100], 9, 9, 9]  # not mostly the same: both stay
    assert fed_again(2, [long, branch, [*long, 1], [*branch, 1]]) == [200, 3, 1, 1]
    few = [1] * (LEAST_SHARED - 1)
    assert fed_again(2, [[*few, 2], [*few, 3]]) == [LEAST_SHARED, LEAST_SHARED]


def batching(stages: int = 2, rows: int = 4) -> Batching:
    """With no guesses and no time."""
    return Batching(stages, rows, lambda length: prefill_chunk(4, length), lambda: 0.0)


def command(sequence: int, prompt: Sequence[int]) -> Decode:
    """For ten tokens."""
    return Decode(sequence, tuple(prompt), 10, Sampling(), (END,), speculates=False)


def test_a_long_prompt_holds_up_nobody() -> None:
    """Between its pieces the others have their turn, and the second piece waits for no answer."""
    found = batching(1)
    found.add(command(1, [1, 2]))
    first = found.next()
    assert first is not None
    found.chosen(first.number, [Chosen((3,), ended=False)])
    found.add(command(2, [4] * 700))
    kinds = []
    for _ in range(6):
        following = found.next()
        assert following is not None
        kinds.append(following.of.sequences)
        chosen = (5,) if following.of.chooses else ()
        found.chosen(following.number, [Chosen(chosen, ended=False)])
    assert kinds[:6] == [(1,), (2,), (1,), (2,), (1,), (2,)]


def test_answers_of_unknown_passes_are_refused() -> None:
    found = batching()
    found.add(command(1, [1, 2]))
    following = found.next()
    assert following is not None
    with pytest.raises(ProtocolError, match="not begun here"):
        found.chosen(following.number + 1, [Chosen((1,), ended=False)])
    with pytest.raises(ProtocolError, match="not begun here"):
        found.chosen(following.number, [])
    for tokens, ended in (((), False), ((1, 2), False), ((), True)):
        found = batching()
        found.add(command(1, [1, 2]))
        following = found.next()
        assert following is not None
        with pytest.raises(ProtocolError, match="too few tokens, or too many"):
            found.chosen(following.number, [Chosen(tokens, ended=ended)])
    found = batching()
    found.add(command(1, [1, 2]))
    with pytest.raises(ProtocolError, match="number of another"):
        found.add(command(1, [1, 2]))
    with pytest.raises(ProtocolError, match="no tokens"):
        found.add(command(2, []))
