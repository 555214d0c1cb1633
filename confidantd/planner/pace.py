"""How long a step of synchronous 1F1B takes, or a round of tokens, in closed form; built up
from the last stage.

What stands behind a stage is summed up in three numbers, so that a search can put one
stage before another. Beside the event simulation it is a little too fast where links are slow
(median 1.00 of it where they take a tenth of a stage, 0.95 at half), and never far off in
the order of plans, which is what it is for.

A round is one more token for each of some requests. Every token goes through all stages and
back to the first one. Few requests wait for their own tokens; many keep the slowest stage or
link busy, and then nothing else counts.
"""

from __future__ import annotations

from typing import NamedTuple

from confidantd.planner.simulate import LinkCost


class Suffix(NamedTuple):
    """The stages from some place on: seconds until the first microbatch is back (`there`),
    until all are (`done`), and that its own first stage needs to send one on (`sending`).

    Of a round: until a token has passed them, and what the busiest of them does in all.
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


def round_behind(suffix: Suffix, link: LinkCost, requests: int) -> Suffix:
    """The suffix as seen over a link, which every request's token takes."""
    there = suffix.there + link.seconds + link.latency
    return Suffix(there, max(suffix.done, requests * link.seconds), 0.0)


def round_before(suffix: Suffix, seconds: float, requests: int) -> Suffix:
    """One more stage in front, which computes one token after the other."""
    return Suffix(suffix.there + seconds, max(suffix.done, requests * seconds), 0.0)


def round_seconds(suffix: Suffix, back: LinkCost | None, requests: int) -> float:
    """Of a whole pipeline whose tokens go back over a link; None: it is one device."""
    if back is not None:
        suffix = round_behind(suffix, back, requests)
    return max(suffix.there, suffix.done)
