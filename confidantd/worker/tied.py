"""The table that embedding and head share, where the two ends are on two stages."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from confidantd.engine.tensors import Floats
from confidantd.wire.frames import FrameKind
from confidantd.wire.stage import StageAssignment

# The gradient of the table, as large as the table, goes in pieces: at both ends a few of them
# are in memory at a time, and on Wi-Fi of 50 Mbit/s and 10 ms the line still never runs dry.
TIED_PIECE_BYTES, TIED_AHEAD = 512 * 1024, 8


class TiedEnd(Protocol):
    """A stage that has one end."""

    def tied_gradient(self) -> Floats | None:
        """Its own gradient [V, D], where it lies."""
        ...

    def add_tied_gradient(self, other: Floats, first_row: int = 0) -> None:
        """Add rows of the other end's."""
        ...


class Carrier(Protocol):
    """How arrays come and go."""

    async def send(
        self, stage: int, kind: FrameKind, step: int, microbatch: int, array: NDArray[Any]
    ) -> None:
        """Queue a copy."""
        ...

    async def receive(self, kind: FrameKind, step: int, microbatch: int) -> NDArray[Any]:
        """Wait for one."""
        ...

    async def compute(self, work: Any, *arguments: Any) -> Any:
        """Run on the compute thread."""
        ...


async def join_tied_gradients(end: TiedEnd, carrier: Carrier, partner: int, step: int) -> None:
    """Make this end's gradient the sum of both, as `partner` does at the same time."""
    mine = end.tied_gradient()
    assert mine is not None
    rows = tied_rows(mine.shape[1])
    firsts, sent = range(0, len(mine), rows), 0
    for index, first in enumerate(firsts):
        # what was sent may be changed; both ends send ahead, so neither waits for the other
        for ahead in range(sent, min(len(firsts), index + TIED_AHEAD)):
            part = mine[firsts[ahead] : firsts[ahead] + rows]
            await carrier.send(partner, FrameKind.TIED_GRADIENT, step, ahead, part)
            sent = ahead + 1
        other = await carrier.receive(FrameKind.TIED_GRADIENT, step, index)
        await carrier.compute(end.add_tied_gradient, other, first)


def tied_rows(width: int) -> int:
    """How many rows of the table one piece of its gradient has."""
    return max(1, TIED_PIECE_BYTES // (4 * width))


def tied_partner(place: StageAssignment) -> int | None:
    """The stage that holds the other end of a trained tied embedding, if another does."""
    spec = place.spec
    if not spec.model.tied or spec.training != "full" or place.stages == 1:
        return None
    if spec.embedding:
        return place.stages - 1
    return 0 if spec.head else None
