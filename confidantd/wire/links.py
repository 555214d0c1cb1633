"""What a device measured of its connections to others, as gossiped with its heartbeats."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LINKS = 512  # of one device; the largest fleet that is planned for
MAX_MBPS = 1e6  # a terabit: no radio or cable of a home
MAX_ROUND_TRIP_MS = 60_000.0


@dataclass(frozen=True, slots=True)
class Link:
    """Bandwidth (Mbit/s of payload) and round trip to one device; None: not measured yet."""

    mbps: float | None = None
    round_trip_ms: float | None = None


def plausible(link: Link) -> bool:
    """Whether the numbers can be true: what a peer says may be anything, NaN included."""
    return (link.mbps is None or 0 < link.mbps <= MAX_MBPS) and (
        link.round_trip_ms is None or 0 <= link.round_trip_ms <= MAX_ROUND_TRIP_MS
    )
