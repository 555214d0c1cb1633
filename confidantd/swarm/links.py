"""When which link is measured, and what measurements and transfers make of its bandwidth. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from confidantd.ids import DeviceId

TRANSFER_WEIGHT = 0.25  # of a real transfer: disks and other traffic slow it, a probe is cleaner
SETTLE_SECONDS = 2.0  # after a connection began: both devices are busy with greeting
# The pair's other device begins so much later: by then it knows the first one's value.
SECOND_SECONDS = 60.0
EVERY_SECONDS = 600.0  # a probe takes 1 to 3 s and at most 8 MiB
# Between the probes of one device on average, so that many devices do not fill the air: twenty
# of them send 3 MB in 3 s altogether, each pair is measured every 20 minutes.
LEAST_PAUSE_SECONDS = 60.0
RETRY_SECONDS = 5.0  # it was occupied; doubled each time


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member that could be measured now. `measured`: there is a value for the link already;
    `working`: one of the two holds a stage, whose traffic must not be disturbed for another.
    """

    device: DeviceId
    measured: bool
    working: bool


def smoothed(before: float | None, transfer_mbps: float) -> float:
    """The bandwidth of a link after a real transfer at `transfer_mbps`."""
    if before is None:
        return transfer_mbps
    return before + TRANSFER_WEIGHT * (transfer_mbps - before)


class LinkSchedule:
    """Times are seconds of one monotonic clock."""

    def __init__(self, me: DeviceId, spread: random.Random) -> None:
        self._me = me
        self._spread = spread
        self._due: dict[DeviceId, float] = {}
        self._failures: dict[DeviceId, int] = {}

    def connected(self, device: DeviceId, now: float) -> None:
        """A connection begins, maybe by another way than the last one."""
        self._failures.pop(device, None)
        self._due[device] = now + (SETTLE_SECONDS if self._me < device else SECOND_SECONDS)

    def next(self, candidates: Iterable[Candidate], now: float) -> DeviceId | None:
        """Whom to measure now: of those that are due the one that has waited longest."""
        found = [
            (self._due[c.device], c.device)
            for c in candidates
            if self._due.get(c.device, now + 1) <= now and not (c.measured and c.working)
        ]
        return min(found)[1] if found else None

    def measured(self, device: DeviceId, now: float, members: int) -> None:
        """The link has a new value; `members` share the air."""
        self._failures.pop(device, None)
        every = max(EVERY_SECONDS, LEAST_PAUSE_SECONDS * members)
        self._due[device] = now + every * self._spread.uniform(0.8, 1.2)

    def failed(self, device: DeviceId, now: float) -> None:
        """It could not be measured; two that refused each other must not meet again."""
        failures = self._failures.get(device, 0)
        self._failures[device] = failures + 1
        pause = min(RETRY_SECONDS * 2.0 ** min(failures, 10), EVERY_SECONDS)
        self._due[device] = now + pause * self._spread.uniform(0.5, 1.5)
