"""`python -m tests.lan.relay SECONDS NAMESPACE/INTERFACE=NAMESPACE/INTERFACE ...`: slow cables.

Makes both interfaces of each pair (TAP devices) and passes on what comes out of one to the other,
so much later. Says `ready` once all are there, and ends with its standard input. For kernels
without netem. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000  # sched.h
_FRAME_BYTES = 65_536
_MOST_WAITING = 4_096  # frames of a direction; more are lost, as in a router


def open_tap(namespace: str, interface: str) -> int:
    """A file of a new interface in a namespace, which this process then is in."""
    library = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as entry:
        if library.setns(entry.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"no way into the namespace {namespace}")
    tap = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH", interface.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(tap, _TUNSETIFF, request)
    return tap


class Relay:
    """Frames of one direction that are on their way."""

    def __init__(self, source: int, target: int, seconds: float) -> None:
        self.source = source
        self._target, self._seconds = target, seconds
        self._waiting: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """All that the source has now."""
        while True:
            try:
                frame = os.read(self.source, _FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the interface is down
                return
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append((time.monotonic() + self._seconds, frame))

    def deliver(self) -> float | None:
        """All that has waited long enough; gives the moment at which there is more."""
        while self._waiting:
            due, frame = self._waiting[0]
            if due > time.monotonic():
                return due
            self._waiting.popleft()
            try:
                os.write(self._target, frame)
            except OSError:  # the interface is down, or full
                continue
        return None


def main() -> None:
    """Until standard input ends."""
    seconds, relays = float(sys.argv[1]), []
    for pair in sys.argv[2:]:
        one, other = (open_tap(*end.split("/")) for end in pair.split("="))
        relays += [Relay(one, other, seconds), Relay(other, one, seconds)]
    print("ready", flush=True)
    sources = [relay.source for relay in relays]
    while True:
        moments = [due for due in (relay.deliver() for relay in relays) if due is not None]
        wait = max(0.0, min(moments) - time.monotonic()) if moments else None
        readable, _, _ = select.select([sys.stdin, *sources], [], [], wait)
        if sys.stdin in readable:
            return
        for relay in relays:
            if relay.source in readable:
                relay.take()


if __name__ == "__main__":
    main()
