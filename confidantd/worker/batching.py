"""Which tokens stage 0 feeds into the pipeline next: batches that sequences join and leave.

A sequence waits for a row in the stages' caches, then its prompt goes through in pieces, alone.
After that it is in one of as many lanes as there are stages. A lane is a batch whose next pass
begins when its last one has come back, so each stage has one to compute while the others are
elsewhere. Passes of lanes and pieces of prompts take turns: a long prompt holds up nobody.

What an ended sequence left in the caches stays until its row is needed, the oldest going first: a
prompt that begins with the same tokens, as the next turn of a chat does, goes on from there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from confidantd.errors import ProtocolError
from confidantd.wire.passes import Begun, Pass
from confidantd.wire.worker import Decode
from confidantd.worker.speculation import Feed

LEAST_SHARED = 16  # tokens at the beginning, to go on from another sequence
MOSTLY = 0.75  # shared of what an ended sequence left: its row is taken, not copied
MOST_TOLD = 128  # sequences that were halted, in one pass
PIECES_AHEAD = 1  # of prompts under way, beside one for each stage


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the head chose after a pass for one of its sequences, and whether that was the end."""

    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Next:
    """A pass that begins now, and its tokens [b][T]."""

    number: int
    of: Pass
    ids: list[list[int]]


@dataclass(slots=True)
class _Sequence:
    """One that has a row."""

    prompt: tuple[int, ...]
    feed: Feed
    filled: int = 0  # tokens of the prompt that were fed
    flying: int = 0  # passes under way
    halted: bool = False

    @property
    def held(self) -> int:
        """Positions that the caches hold of it, at least."""
        return self.filled if self.filled < len(self.prompt) else len(self.feed.text) - 1


@dataclass(frozen=True, slots=True)
class _Flight:
    lane: int | None  # None: a piece of a prompt
    of: Pass


class Batching:
    """Of one job, on the stage with the embedding; `rows` sequences have a row at a time, a piece
    of a prompt of n tokens has `piece(n)`.
    """

    def __init__(
        self, stages: int, rows: int, piece: Callable[[int], int], clock: Callable[[], float]
    ) -> None:
        self._rows, self._piece, self._clock = rows, piece, clock
        self._most_pieces = stages + PIECES_AHEAD
        self._waiting: deque[Decode] = deque()
        self._active: dict[int, _Sequence] = {}
        self._filling: deque[int] = deque()
        self._lanes: list[list[int]] = [[] for _ in range(stages)]
        self._left: dict[int, list[int]] = {}  # what ended sequences left, the oldest first
        self._flights: dict[int, _Flight] = {}
        self._numbers = itertools.count()
        self._dropped: list[int] = []
        self._begun: list[Begun] = []
        self._stopped: list[int] = []
        self._prompts_turn = True
        self._last_lane = 0

    def add(self, command: Decode) -> None:
        """One more sequence."""
        known = {waiting.sequence for waiting in self._waiting} | self._active.keys()
        if not command.prompt or command.sequence in known | self._left.keys():
            raise ProtocolError("a sequence has no tokens, or the number of another one")
        self._waiting.append(command)

    def halt(self, sequence: int) -> None:
        """Nobody wants more of it. Of one that is not known here the head may know."""
        self._waiting = deque(w for w in self._waiting if w.sequence != sequence)
        found = self._active.get(sequence)
        if found is None:
            self._stopped.append(sequence)
        else:
            found.halted = True
            if sequence in self._filling:
                self._filling.remove(sequence)
            if not found.flying:
                self._end(sequence)

    def next(self, *, prompts: bool = True) -> Next | None:
        """What to feed now; None until something is added or comes back. Without `prompts` only
        what is in lanes.
        """
        ways = (self._next_piece, self._next_of_lanes) if prompts else (self._next_of_lanes,)
        for way in ways if self._prompts_turn else reversed(ways):
            found = way()
            if found is not None:
                self._prompts_turn = way != self._next_piece
                return found
        return None

    def meanwhile(self, number: int) -> None:
        """What can be done while a pass is under way."""
        flight = self._flights.get(number)
        if flight is not None and flight.lane is not None and len(flight.of.sequences) == 1:
            self._active[flight.of.sequences[0]].feed.catch_up()

    def chosen(self, number: int, found: Sequence[Chosen]) -> None:
        """A pass came back."""
        flight = self._flights.pop(number, None)
        if flight is None or len(found) != len(flight.of.sequences):
            raise ProtocolError("tokens came of a pass that was not begun here")
        for sequence, chosen in zip(flight.of.sequences, found, strict=True):
            most = 1 + len(flight.of.guess) if flight.of.chooses else 0
            if not min(most, 1) <= len(chosen.tokens) <= most or (chosen.ended and not most):
                raise ProtocolError("a pass came back with too few tokens, or too many")
            self._came_back(sequence, chosen, flight)
        if flight.lane is not None:
            self._even_out(flight.lane)

    def _came_back(self, sequence: int, chosen: Chosen, flight: _Flight) -> None:
        state = self._active[sequence]
        state.flying -= 1
        if flight.of.chooses:
            state.feed.take(chosen.tokens)
        if chosen.ended or (state.halted and not state.flying):
            self._end(sequence)
        elif flight.of.chooses and flight.lane is None and not state.halted:
            min(self._lanes, key=len).append(sequence)

    def _end(self, sequence: int) -> None:
        """Its row goes to who begins alike, or who needs one."""
        state = self._active.pop(sequence)
        for lane in self._lanes:
            if sequence in lane:  # the last one takes its place, as in the caches
                lane[lane.index(sequence)] = lane[-1]
                lane.pop()
        if state.halted:
            self._stopped.append(sequence)
        if state.held >= LEAST_SHARED:
            self._left[sequence] = state.feed.text[: state.held]
        else:
            self._dropped.append(sequence)

    def _even_out(self, lane: int) -> None:
        """A lane that came back gives one to a much shorter one."""
        shortest = min(self._lanes, key=len)
        if len(self._lanes[lane]) >= len(shortest) + 2:
            shortest.append(self._lanes[lane].pop())

    def _next_piece(self) -> Next | None:
        """Of the prompt that came first."""
        pieces = sum(flight.lane is None for flight in self._flights.values())
        if pieces >= self._most_pieces:
            return None
        if not self._filling and not self._admit():
            return None
        sequence = self._filling[0]
        state = self._active[sequence]
        prompt, start = state.prompt, state.filled
        end = min(len(prompt), start + self._piece(len(prompt)))
        if end == len(prompt):
            self._filling.popleft()
        state.filled = end
        return self._fly(None, [sequence], (start,), [list(prompt[start:end])], end == len(prompt))

    def _next_of_lanes(self) -> Next | None:
        """Of the next lane that is not under way."""
        under_way = {flight.lane for flight in self._flights.values()}
        count = len(self._lanes)
        for step in range(1, count + 1):
            lane = (self._last_lane + step) % count
            sequences = self._lanes[lane]
            if sequences and lane not in under_way:
                self._last_lane = lane
                feeds = [self._active[sequence].feed for sequence in sequences]
                ids = [feed.next(alone=len(sequences) == 1) for feed in feeds]
                past = tuple(feed.past for feed in feeds)
                return self._fly(lane, sequences, past, ids, True)
        return None

    def _fly(
        self,
        lane: int | None,
        sequences: Sequence[int],
        past: tuple[int, ...],
        ids: list[list[int]],
        chooses: bool,
    ) -> Next:
        guess = () if lane is None or len(ids) > 1 else tuple(ids[0][1:])
        told, self._stopped = self._stopped[:MOST_TOLD], self._stopped[MOST_TOLD:]
        changes = tuple(self._dropped), tuple(self._begun), tuple(told)
        self._dropped, self._begun = [], []
        of = Pass(tuple(sequences), past, guess, chooses, *changes)
        number = next(self._numbers)
        self._flights[number] = _Flight(lane, of)
        for sequence in sequences:
            self._active[sequence].flying += 1
        return Next(number, of, ids)

    def _admit(self) -> bool:
        """Give a row to the sequence that has waited longest, if there is one for it."""
        if not self._waiting or len(self._active) >= self._rows:
            return False
        command = self._waiting.popleft()
        sequence, prompt = command.sequence, command.prompt
        feed = Feed(prompt, command.max_new_tokens, guesses=command.speculates, clock=self._clock)
        state = _Sequence(prompt, feed)
        source, shared = self._alike(prompt)
        if source is not None:
            kept = source in self._active or (
                self._has_room() and shared < MOSTLY * len(self._left[source])
            )
            if kept:
                self._make_room()
            else:
                del self._left[source]
            self._begun.append(Begun(sequence, source, shared, kept))
            state.filled = shared
        else:
            self._make_room()
        self._active[sequence] = state
        self._filling.append(sequence)
        return True

    def _has_room(self) -> bool:
        return len(self._active) + len(self._left) < self._rows

    def _make_room(self) -> None:
        if not self._has_room():
            oldest = next(iter(self._left))
            del self._left[oldest]
            self._dropped.append(oldest)

    def _alike(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        """The sequence that shares most of the beginning, and how much; at least one token of a
        prompt has to be fed.
        """
        texts = {s: state.feed.text[: state.held] for s, state in self._active.items()}
        texts |= self._left
        found = {s: min(shared(prompt, text), len(prompt) - 1) for s, text in texts.items()}
        best = max(found, key=lambda s: (found[s], s in self._left), default=None)
        if best is None or found[best] < LEAST_SHARED:
            return None, 0
        return best, found[best]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
