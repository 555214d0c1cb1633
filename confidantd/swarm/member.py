"""What this device knows of one member: heartbeats, round trip, resources. Pure bookkeeping."""

from __future__ import annotations

from collections import deque

from confidantd.ids import DeviceId
from confidantd.swarm.detector import Detector
from confidantd.swarm.election import Word
from confidantd.wire.links import Link
from confidantd.wire.messages import Beat
from confidantd.wire.resources import Resources

ROUND_TRIPS = 8  # the least of the last few: what the network takes, not what a busy device does
FULL_BEAT_EVERY = 10  # heartbeats; the others leave out what has not changed
MAX_SENT = 8


class Member:
    """State of one paired device. Times are seconds of one monotonic clock."""

    def __init__(self, device: DeviceId) -> None:
        self.device = device
        self.detector = Detector()
        self.word: Word | None = None
        self.resources: Resources | None = None
        self.mbps: float | None = None  # from it to this device, as measured here
        self.links: dict[DeviceId, Link] = {}  # as measured there
        self.left = False  # said good-bye, and was not connected since
        self._sequence = 0
        self._sent: deque[tuple[int, float]] = deque(maxlen=MAX_SENT)
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._last_heard: tuple[int, float] | None = None
        self._since_full = FULL_BEAT_EVERY

    @property
    def round_trip_ms(self) -> float | None:
        """Milliseconds to the member and back, without what it waited there."""
        return round(min(self._round_trips) * 1000, 2) if self._round_trips else None

    @property
    def link(self) -> Link:
        """What this device measured of the link to the member."""
        return Link(self.mbps, self.round_trip_ms)

    def connected(self, now: float) -> None:
        """A connection begins: the other side may know nothing of us."""
        self.detector.connected(now)
        self.left = False
        self._since_full = FULL_BEAT_EVERY
        self._round_trips.clear()

    def said_goodbye(self) -> None:
        """The member's daemon ends on purpose."""
        self.detector.said_goodbye()
        self.left = True

    def next_sequence(self, now: float) -> int:
        """The number of the heartbeat that goes out now."""
        self._sequence += 1
        self._sent.append((self._sequence, now))
        return self._sequence

    def full_beat_due(self) -> bool:
        """True every tenth time and at the beginning of a connection."""
        self._since_full += 1
        if self._since_full <= FULL_BEAT_EVERY:
            return False
        self._since_full = 0
        return True

    def full_beat_soon(self) -> None:
        """Something changed that only full heartbeats carry."""
        self._since_full = FULL_BEAT_EVERY

    def echo(self, now: float) -> tuple[int | None, float]:
        """The last heartbeat from the member, and how long ago it came."""
        if self._last_heard is None:
            return None, 0.0
        return self._last_heard[0], now - self._last_heard[1]

    def heard(self, beat: Beat, now: float) -> None:
        """A heartbeat of the member came in."""
        self.detector.heard(now)
        self.word = Word(beat.term, beat.claim, frozenset(beat.heard), beat.rank)
        self._last_heard = (beat.sequence, now)
        if beat.resources is not None:
            self.resources = beat.resources
            self.links = beat.links
        for sequence, sent in self._sent:
            if sequence == beat.echo:
                self._round_trips.append(max(0.0, now - sent - beat.echo_held_seconds))
