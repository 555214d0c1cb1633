"""How much of this device's processor other programs use: all that is busy, less what is ours."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import psutil

SMOOTHED_SECONDS = 30.0  # a page that loads is no use, a call is
LEAST_SECONDS = 1.0  # the kernel counts in hundredths: shorter says too little


class UseMeter:
    """Compares two counters of CPU seconds from time to time.

    `busy` is of all programs on the cores that this process may use, and None where the
    system does not tell (Android); `own` is of this process and all below it.
    """

    def __init__(
        self,
        busy: Callable[[], tuple[float, int] | None],
        own: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._busy = busy
        self._own = own
        self._clock = clock
        self._last: tuple[float, float] | None = None  # when, CPU seconds of others
        self._share: float | None = None

    def latest(self) -> float | None:
        """Share of all cores, 0 to 1, smoothed; None until there were two looks."""
        found, now = self._busy(), self._clock()
        if found is None:
            return None
        if self._last is not None and now - self._last[0] < LEAST_SECONDS:
            return self._share
        seconds, cores = found
        others = seconds - self._own()
        if self._last is not None:
            self._add((others - self._last[1]) / (cores * (now - self._last[0])), now)
        self._last = now, others
        return self._share

    def _add(self, share: float, now: float) -> None:
        share = min(max(share, 0.0), 1.0)  # ours and all are not read in the same moment
        if self._share is None or self._last is None:
            self._share = share
            return
        weight = 1 - math.exp((self._last[0] - now) / SMOOTHED_SECONDS)
        self._share += weight * (share - self._share)


def busy_seconds() -> tuple[float, int] | None:
    """CPU seconds of all programs since the start, on how many cores; those stolen by other
    machines on the same hardware are not counted.
    """
    try:
        found = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError):  # Android denies /proc/stat
        return None
    if hasattr(os, "sched_getaffinity"):
        ours = os.sched_getaffinity(0)
        found = [times for core, times in enumerate(found) if core in ours] or found
    names = ("user", "nice", "system", "irq", "softirq")
    return sum(getattr(times, name, 0.0) for times in found for name in names), len(found)


def own_seconds() -> float:
    """CPU seconds of this process, its workers and whatever they started, ended ones included:
    a process's time goes to its parent when it ends, so the sum never falls.
    """
    total = 0.0
    for process in _family():
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has just ended: the parent has its seconds by the next look
            continue
        total += times.user + times.system
        total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def _family() -> list[psutil.Process]:
    me = psutil.Process()
    try:
        return [me, *me.children(recursive=True)]
    except (psutil.Error, OSError):  # a hardened /proc
        return [me]
