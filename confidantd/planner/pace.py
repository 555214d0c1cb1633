"""How long a step of synchronous 1F1B takes, in closed form; built up from the last stage.

What stands behind a stage is summed up in three numbers, so that a search can put one
stage before another. Beside the event simulation it is a little too fast where links are slow
(median 1.00 of it where they take a tenth of a stage, 0.95 at half), and never far off in
the order of plans, which is what it is for.
"""

from __future__ import annotations

from typing import NamedTuple

from confidantd.planner.simulate import LinkCost


class Suffix(NamedTuple):
    """The stages from some place on: seconds until the first microbatch is back (`there`),
    until all are (`done`), and that its own first stage needs to send one on (`sending`).
    """

    there: float
    done: float
    sending: float


NOTHING = Suffix(0.0, 0.0, 0.0)


def behind(suffix: Suffix, link: LinkCost, microbatches: int) -> Suffix:
    """The suffix as seen over a link: both ways for each microbatch, and its first stage shares
    its radio between this link and the one behind it.
    """
    way = 2 * (link.seconds + link.latency)
    radio = suffix.there + (microbatches - 1) * (link.seconds + suffix.sending)
    return Suffix(suffix.there + way, max(suffix.done, radio) + way, link.seconds)


def before(
    suffix: Suffix, forward: float, seconds: float, in_flight: int, microbatches: int
) -> Suffix:
    """One more stage in front, with its seconds of a forward and of both passes.

    It is slowed by itself (all its work, and what it waits for the first backward that its
    forwards ahead do not fill) or by how few microbatches may be in flight behind it.
    """
    there = suffix.there + seconds
    waits = max(0.0, suffix.there - (in_flight - 1) * forward)
    done = max(
        suffix.done + seconds,
        microbatches * seconds + waits,
        microbatches / in_flight * there,
    )
    return Suffix(there, done, suffix.sending)


def step_seconds(suffix: Suffix, microbatches: int) -> float:
    """Of a whole pipeline: its first stage has one neighbour only."""
    return max(suffix.done, suffix.there + (microbatches - 1) * suffix.sending)
