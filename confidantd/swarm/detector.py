"""Failure detection from heartbeat arrivals, after the phi-accrual detector (Hayashibara 2004).

Pure: the clock is passed in, in seconds. phi is -log10 of the chance that a heartbeat still
comes after a silence as long as this one, given how earlier ones arrived.
"""

from __future__ import annotations

import math
from collections import deque

from confidantd.swarm.state import PeerState

BEAT_SECONDS = 1.0
MIN_INTERVAL_SECONDS = 0.5  # extra heartbeats, sent when something changes, teach nothing
WINDOW = 32  # arrivals; half a minute follows a device that walks out of good reception
SUSPECT_PHI = 3.0
GONE_PHI = 8.0
# Floor: with regular beats gone comes at 1 + 5.6 x 0.36 = 3.0 s, suspect at 2.1 s, so that a
# loaded machine does not flap. Ceiling: however uneven the arrivals, gone comes within 10 s.
MIN_DEVIATION_SECONDS = 0.36
MAX_DEVIATION_SECONDS = 1.25
MAX_MEAN_SECONDS = 3.0
REFUSED_GONE_SECONDS = 0.5  # nobody listens there any more: a restart takes longer than that


class Detector:
    """Watches one peer. It is gone until its first heartbeat."""

    def __init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None
        self._lost_at: float | None = None
        self._refused = False

    def heard(self, now: float) -> None:
        """A heartbeat arrived."""
        if self._last is not None and now - self._last >= MIN_INTERVAL_SECONDS:
            self._intervals.append(now - self._last)
        self._last = now

    def connected(self, now: float) -> None:
        """A connection begins: a sign of life. The gap before it teaches nothing."""
        self._last = now
        self._lost_at = None
        self._refused = False

    def disconnected(self, now: float) -> None:
        """The connection ended."""
        if self._lost_at is None:
            self._lost_at = now

    def refused(self) -> None:
        """Nothing listens at the peer's address: no use to wait for its heartbeat."""
        self._refused = self._lost_at is not None

    def said_goodbye(self) -> None:
        """The peer ends on purpose. What was learned of its intervals goes, too."""
        self._last = None
        self._intervals.clear()

    def forgive(self, seconds: float) -> None:
        """This device itself stood still for so long: that silence says nothing."""
        if self._last is not None:
            self._last += seconds

    def phi(self, now: float) -> float:
        """How surprising the silence is; infinite without any heartbeat so far."""
        if self._last is None:
            return math.inf
        mean, deviation = self._arrivals()
        tail = 0.5 * math.erfc((now - self._last - mean) / (deviation * math.sqrt(2)))
        return -math.log10(tail) if tail > 0 else math.inf

    def state(self, now: float) -> PeerState:
        """alive, suspect or gone."""
        phi = self.phi(now)
        if phi >= GONE_PHI:
            return "gone"
        if self._lost_at is not None:
            given_up = self._refused and now - self._lost_at >= REFUSED_GONE_SECONDS
            return "gone" if given_up else "suspect"
        return "suspect" if phi >= SUSPECT_PHI else "alive"

    def _arrivals(self) -> tuple[float, float]:
        if not self._intervals:
            return BEAT_SECONDS, MIN_DEVIATION_SECONDS
        mean = sum(self._intervals) / len(self._intervals)
        variance = sum((x - mean) ** 2 for x in self._intervals) / len(self._intervals)
        deviation = min(max(math.sqrt(variance), MIN_DEVIATION_SECONDS), MAX_DEVIATION_SECONDS)
        return min(max(mean, BEAT_SECONDS), MAX_MEAN_SECONDS), deviation
