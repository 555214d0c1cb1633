"""One backend at work on its shares: its programs, and a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from confidantd.engine.backends.base import Backend, DeviceKind, SessionSetting
from confidantd.engine.program import EngineProgram, fixed_dimensions
from confidantd.errors import WorkerError

_T = TypeVar("_T")
_Made = TypeVar("_Made")
CORES_TO_SPARE = 4  # for each processor that is not the CPU; with fewer none is set aside


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

    def start(
        self, make: Callable[[], _Made], run: Callable[[_Made], _T]
    ) -> Future[tuple[_T, float]]:
        """Make what is run, which takes long only the first time, and run it; the result comes
        with the seconds of the run alone.
        """
        return self._pool.submit(self._timed, make, run)

    def _timed(self, make: Callable[[], _Made], run: Callable[[_Made], _T]) -> tuple[_T, float]:
        made = make()
        started = time.perf_counter()
        try:
            found = run(made)
        finally:
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
        return found, seconds

    def close(self) -> None:
        """End the thread after what it is doing now."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Cores and threads of one backend; without cores it runs wherever it likes."""

    cores: tuple[int, ...]
    threads: int


def places(kinds: Sequence[DeviceKind], threads: int, cores: Sequence[int]) -> list[Place]:
    """Where backends on processors of these kinds work at the same time.

    Those on the CPU share its cores and threads as evenly as they go. One on another
    processor needs a thread that feeds it: where there are cores enough, on one of the last
    in `cores`, and else on any.
    """
    on_cpu = kinds.count("cpu")
    feeding = len(kinds) - on_cpu
    own = feeding if len(cores) >= CORES_TO_SPARE * feeding + on_cpu else 0
    shared = cores[: len(cores) - own]
    ends = [len(shared) * i // max(1, on_cpu) for i in range(on_cpu + 1)]
    pieces = iter([tuple(shared[a:b]) for a, b in itertools.pairwise(ends)])
    feeders = iter([(core,) for core in cores[len(shared) :]])
    share = max(1, min(threads, len(shared) or threads) // max(1, on_cpu))
    fits = len(shared) >= on_cpu
    found = []
    for kind in kinds:
        if kind == "cpu":
            piece = next(pieces)
            found.append(Place(piece if fits else (), share))
        else:
            found.append(Place(next(feeders, ()), 1))
    return found


def own_cores() -> list[int]:
    """The cores that this process may use, the strongest first; none where the system does not
    tell.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0), key=lambda core: (-_capacity(core), core))


def _capacity(core: int) -> int:
    """What Linux says of cores that differ, as those of phones do: 1024 is the strongest."""
    try:
        return int(Path(f"/sys/devices/system/cpu/cpu{core}/cpu_capacity").read_text())
    except (OSError, ValueError):
        return 1024
