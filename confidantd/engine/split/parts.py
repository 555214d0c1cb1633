"""One backend at work on its shares: its programs, and a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from confidantd.engine.backends.base import Backend, SessionSetting
from confidantd.engine.program import EngineProgram, fixed_dimensions
from confidantd.errors import WorkerError

_T = TypeVar("_T")


class BackendPrograms:
    """The programs of one backend, each made once for each size of share."""

    def __init__(self, backend: Backend, paths: Mapping[str, Path], threads: int) -> None:
        self.backend = backend
        self._paths = paths
        self._threads = threads
        self._made: dict[tuple[str, int], EngineProgram] = {}
        self._making = threading.Lock()

    def get(self, name: str, symbol: str = "", count: int = 0) -> EngineProgram:
        """The program `name` for `count` groups or columns; raises as `Backend.session` does."""
        with self._making:
            if (name, count) not in self._made:
                self._made[name, count] = self._make(name, symbol, count)
            return self._made[name, count]

    def _make(self, name: str, symbol: str, count: int) -> EngineProgram:
        if name not in self._paths:
            raise WorkerError(f"this stage was not given the program {name}")
        path = self._paths[name]
        dimensions = fixed_dimensions(path, {symbol: count} if symbol else {})
        setting = SessionSetting(threads=self._threads, dimensions=dimensions)
        return EngineProgram(path, self.backend, setting)

    def drop_all_but(self, counts: Mapping[str, int]) -> None:
        """Forget programs of other sizes; `counts` by unit (the first word of a name)."""
        with self._making:
            for name, count in list(self._made):
                unit = name.split("_")[0]
                if unit in counts and counts[unit] != count:
                    del self._made[name, count]


@dataclass(slots=True)
class BackendThread:
    """Runs a backend's programs one after the other on a thread, pinned to cores if given."""

    name: str
    cores: tuple[int, ...] = ()
    busy_seconds: float = 0.0
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix=f"backend-{self.name}", initializer=self._pin
        )

    def _pin(self) -> None:
        if self.cores and hasattr(os, "sched_setaffinity"):
            # the cores may be taken away in between; the thread then runs where it may
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self.cores)

    def start(self, work: Callable[[], _T]) -> Future[tuple[_T, float]]:
        """Begin `work`; the result comes with its seconds."""
        return self._pool.submit(self._timed, work)

    def _timed(self, work: Callable[[], _T]) -> tuple[_T, float]:
        started = time.perf_counter()
        try:
            found = work()
        finally:
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
        return found, seconds

    def close(self) -> None:
        """End the thread after what it is doing now."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def share_cores(backends: int) -> list[tuple[int, ...]]:
    """The cores of this process, as evenly as they go over backends; none if they are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * backends
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < backends:
        return [()] * backends
    ends = [len(cores) * i // backends for i in range(backends + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(ends)]
