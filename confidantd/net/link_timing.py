"""Mbit/s from bytes and the moments when they arrived. Pure; seconds of a monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId

# What comes first is not timed: shapers and access points let a burst (256 KB in ours) through
# at full speed, and TCP finds its pace in it. A slow link is past its burst after a second.
BURST_BYTES = 512 * 1024
BURST_SECONDS = 1.0
# Then as much is timed as is needed: bytes come in pieces of up to 64 KiB, 6 % of a MiB, and a
# quarter of a second outlasts the pauses of Wi-Fi. 50 Mbit/s: 2 MB in all, 0.35 s.
LEAST_BYTES = 1024 * 1024
LEAST_SECONDS = 0.25
MOST_SECONDS = 3.0
# Of a real transfer nothing is left out, so a burst must be a small part of it.
LEAST_TRANSFER_BYTES = 2 * 1024 * 1024


class LinkTiming:
    """Follows one measuring transfer as its bytes come in."""

    def __init__(self) -> None:
        self._bytes = 0
        self._began: float | None = None
        self._first: tuple[float, int] | None = None  # when timing began, bytes until then
        self._last: tuple[float, int] | None = None

    def add(self, size_bytes: int, now: float) -> bool:
        """Some bytes arrived; True when that is enough to tell the bandwidth."""
        self._bytes += size_bytes
        if self._began is None:
            self._began = now
        if self._first is None:
            if self._bytes >= BURST_BYTES or now - self._began >= BURST_SECONDS:
                self._first = now, self._bytes
            return False
        self._last = now, self._bytes
        seconds, timed_bytes = now - self._first[0], self._bytes - self._first[1]
        enough = seconds >= LEAST_SECONDS and timed_bytes >= LEAST_BYTES
        return enough or now - self._began >= MOST_SECONDS

    def mbps(self) -> float | None:
        """The bandwidth after the burst; None if too little arrived."""
        if self._first is None or self._last is None:
            return None
        seconds, timed_bytes = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return 8e-6 * timed_bytes / seconds if seconds > 0 and timed_bytes > 0 else None


@dataclass(slots=True)
class _Busy:
    """A time in which something was under way from one device without a pause."""

    began: float
    running: int = 0
    bytes: int = 0
    alone: bool = True


class TransferTiming:
    """Bandwidth that real transfers show: several at once from one device count together.

    One that shares a radio with transfers of other devices shows less than the link can do,
    and tells nothing.
    """

    def __init__(self) -> None:
        self._busy: dict[DeviceId, _Busy] = {}

    @property
    def running(self) -> bool:
        """Whether any transfer is under way."""
        return bool(self._busy)

    def began(self, device: DeviceId, now: float) -> None:
        """A transfer from a device begins."""
        self._busy.setdefault(device, _Busy(now)).running += 1
        if len(self._busy) > 1:
            for busy in self._busy.values():
                busy.alone = False

    def ended(self, device: DeviceId, size_bytes: int, now: float, *, alone: bool) -> float | None:
        """It ended; Mbit/s if it was the last one under way and they were large enough.

        `alone` is False if it failed, or the sender served other devices too.
        """
        busy = self._busy[device]
        busy.running -= 1
        busy.bytes += size_bytes
        busy.alone = busy.alone and alone
        if busy.running:
            return None
        del self._busy[device]
        if not busy.alone or busy.bytes < LEAST_TRANSFER_BYTES or now <= busy.began:
            return None
        return 8e-6 * busy.bytes / (now - busy.began)
