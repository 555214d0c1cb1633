"""One pass of generation through the stages, as stage 0 tells the others of it."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.errors import ProtocolError

MOST_ROWS = 128  # sequences that a stage holds; so many fit into a frame's header


@dataclass(frozen=True, slots=True)
class Begun:
    """A sequence that begins with the first `length` positions of another one, whose place it
    takes unless that is `kept`.
    """

    sequence: int
    source: int
    length: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """New tokens of some sequences, a row for each, which go through all stages in this order.

    Row i begins at position `past[i]`; what its sequence had after that is forgotten. Several
    tokens a row there are only where there is one row: a piece of a prompt, or one token with a
    `guess` behind it. `chooses`: the head shall choose after it. Before it sequences are
    `dropped`, then others `begun`; of those that `stopped` the head hears no more.
    """

    sequences: tuple[int, ...]
    past: tuple[int, ...]
    guess: tuple[int, ...] = ()
    chooses: bool = True
    dropped: tuple[int, ...] = ()
    begun: tuple[Begun, ...] = ()
    stopped: tuple[int, ...] = ()

    def check(self, shape: tuple[int, ...]) -> None:
        """`ProtocolError` unless an array of that shape [b, T, ...] can be its tokens."""
        rows = len(self.sequences)
        if not 0 < rows <= MOST_ROWS or len(self.past) != rows or len(set(self.sequences)) != rows:
            raise ProtocolError("a pass has not one place for each of its rows")
        if len(shape) < 2 or shape[0] != rows or shape[1] <= len(self.guess):
            raise ProtocolError("a pass has no token before its guesses")
        if rows > 1 and shape[1] != 1:
            raise ProtocolError("a pass has several tokens of several sequences")
        if min(self.past) < 0 or any(begun.length < 0 for begun in self.begun):
            raise ProtocolError("a pass has a negative position")
