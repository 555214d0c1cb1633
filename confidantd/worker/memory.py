"""How much memory this process uses, and a watch that ends it before it uses too much."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from confidantd.errors import DoesNotFitError
from confidantd.wire.stage import StageAssignment

_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
# A phone's core fills 2 GB of fresh memory a second, so a stage is at most 40 MB too large
# when it is seen. The farther away the limit, the less often it is looked at.
LEAST_WATCH_SECONDS, MOST_WATCH_SECONDS = 0.02, 0.5
FILLS_BYTES_PER_SECOND = 2e9
MEGABYTE = 1e6


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    try:
        found = _HIGH_WATER.search(Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    # on Linux this one begins with what the parent had when it started us
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def memory_bytes() -> int:
    """Resident set of this process now; where the system does not tell, its largest so far."""
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return peak_memory_bytes()
    try:
        pages = int(os.read(statm, 100).split()[1])
    finally:
        os.close(statm)
    return pages * os.sysconf("SC_PAGE_SIZE")


def too_large(place: StageAssignment | None, used_bytes: int, bound: str) -> DoesNotFitError:
    """What a person is told of a stage that needs more than it was granted; `bound` says what
    it ran into.
    """
    used = f"{used_bytes / MEGABYTE:.0f} MB"
    if place is None:
        return DoesNotFitError(f"a worker uses {used} before it holds a stage, {bound}")
    spec, granted = place.spec, f"{place.memory_bytes / MEGABYTE:.0f} MB"
    hint = "let it use more (confidantd --memory), or add a device"
    if spec.training is not None:
        hint += ", or train with more --microbatches or --method lora"
    return DoesNotFitError(
        f"stage {place.stage} (layers {spec.first_layer} to {spec.past_last_layer - 1}) uses "
        f"{used} where it was granted {granted}, {bound}",
        hint,
    )


class MemoryWatch:
    """Looks at this process's memory from a thread of its own, and calls `too_much` with the
    bytes once they are over the limit, which may change; 0 is no limit.

    In the worker and not in its daemon: it goes on when that is busy, and needs no permission
    to look into another process.
    """

    def __init__(self, limit_bytes: int, too_much: Callable[[int], None]) -> None:
        self._limit_bytes = limit_bytes
        self._too_much = too_much
        self._over = False
        self._look = threading.Event()  # at once
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def start(self) -> None:
        """Watch until `stop`."""
        self._thread.start()

    @property
    def limit_bytes(self) -> int:
        """The limit; a new one is looked at in that moment."""
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._look.set()

    def stop(self) -> None:
        """End the thread."""
        self._over = True
        self._look.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        wait = LEAST_WATCH_SECONDS
        while True:
            if self._look.wait(wait):
                self._look.clear()
            if self._over:
                return
            used, limit = memory_bytes(), self._limit_bytes
            if limit and used > limit:
                self._too_much(used)
                return
            free = limit - used if limit else math.inf
            soonest = free / FILLS_BYTES_PER_SECOND
            wait = min(max(LEAST_WATCH_SECONDS, soonest), MOST_WATCH_SECONDS)
