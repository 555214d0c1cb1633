"""Timing in short windows, so that what disturbs a shared machine disturbs all sides alike.

A window runs one thing again and again for some time; sides take turns, round after
round, and medians over all rounds are compared. A side may have a companion, which keeps
another core busy with its own work all the while.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Run = Callable[[], object]


@dataclass
class Side:
    """What is timed, on which core (None: wherever it runs), and who works beside it.

    Runs may give the seconds of their halves, forward and backward.
    """

    run: Run
    core: int | None = None
    companion: Run | None = None
    companion_core: int | None = None
    seconds: list[float] = field(default_factory=list)
    companion_seconds: list[float] = field(default_factory=list)
    halves: list[object] = field(default_factory=list)
    companion_halves: list[object] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of one run."""
        return statistics.median(self.seconds)

    @property
    def companion_median(self) -> float:
        """Seconds of one run of the companion."""
        return statistics.median(self.companion_seconds)


def medians(halves: list[object]) -> tuple[float, ...]:
    """Of forward and of backward; nothing where runs gave none."""
    pairs = [pair for pair in halves if isinstance(pair, tuple)]
    return tuple(statistics.median(times) for times in zip(*pairs, strict=True))


def interleave(sides: Mapping[str, Side], rounds: int, window_seconds: float) -> None:
    """Fill in the seconds of every side."""
    for side in sides.values():
        _window(side, 0.0, warm=True)
    for _ in range(rounds):
        for side in sides.values():
            _window(side, window_seconds, warm=False)


def _window(side: Side, seconds: float, *, warm: bool) -> None:
    """Time runs until the window is over, one at least; a thread each, pinned where asked."""
    over = threading.Event()
    companion = None
    if side.companion is not None:
        companion = threading.Thread(target=_keep_busy, args=(side, over))
        companion.start()
    main = threading.Thread(target=_time, args=(side, seconds, warm))
    main.start()
    main.join()
    over.set()
    if companion is not None:
        companion.join()
    if warm:
        side.seconds.clear()
        side.companion_seconds.clear()
        side.halves.clear()
        side.companion_halves.clear()


def _time(side: Side, seconds: float, warm: bool) -> None:
    _pin(side.core)
    started = time.perf_counter()
    while True:
        before = time.perf_counter()
        side.halves.append(side.run())
        now = time.perf_counter()
        side.seconds.append(now - before)
        if now - started >= seconds and (not warm or len(side.seconds) > 1):
            return


def _keep_busy(side: Side, over: threading.Event) -> None:
    assert side.companion is not None
    _pin(side.companion_core)
    while not over.is_set():
        before = time.perf_counter()
        side.companion_halves.append(side.companion())
        side.companion_seconds.append(time.perf_counter() - before)


def _pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
