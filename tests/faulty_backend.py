"""A plugin for tests: the CPU's provider under another name, which fails or slows down on order.

`install` puts it into a folder as a package with an entry point; with that folder on
PYTHONPATH, a daemon and its workers find it like any other plugin.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODE = "FAULTY_MODE"  # "" works; load, compile, run fail there; slow: 4 times slower after a while
NAME = "faulty"
GOOD_RUNS = 150  # more than the measurement of a two-group block takes


class FaultyBackend:
    """Behaves as `MODE` says."""

    name = NAME
    kind = "cpu"
    shares_host_memory = False

    def __init__(self) -> None:
        self.mode = os.environ.get(MODE, "")
        self.runs = 0

    def probe(self) -> Any:
        """Fails in mode `load`, but only in a worker: the daemon's probe found it well."""
        from confidantd.engine.backends.cpu import CpuBackend
        from confidantd.errors import BackendError

        if self.mode == "load" and in_a_worker():
            raise BackendError("its driver does not answer", "restart the driver")
        return CpuBackend().probe()

    def session(self, program: Path, setting: Any) -> Any:
        """Fails in mode `compile` for programs of parts."""
        from confidantd.engine.backends.cpu import CpuBackend
        from confidantd.errors import BackendError

        if self.mode == "compile" and setting.dimensions:
            raise BackendError("it cannot compile this program")
        return _Session(self, CpuBackend().session(program, setting))


class _Session:
    def __init__(self, owner: FaultyBackend, session: Any) -> None:
        self._owner, self._session = owner, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        """As the CPU's, until the good runs are over."""
        from onnxruntime.capi import onnxruntime_pybind11_state as failures

        owner = self._owner
        owner.runs += 1
        over = owner.runs > GOOD_RUNS and in_a_worker()
        if owner.mode == "run" and over:
            raise failures.Fail("the device was lost")
        started = time.perf_counter()
        found = self._session.run(*arguments)
        if owner.mode == "slow" and over:
            threading.Event().wait(3 * (time.perf_counter() - started))
        return found


def in_a_worker() -> bool:
    """The daemon's probe and its measurement find everything well."""
    return "confidantd.worker.stage_worker" in sys.modules


def backend() -> FaultyBackend:
    """What the entry point names."""
    return FaultyBackend()


def install(folder: Path) -> Path:
    """Make the package in `folder`; gives the folder for PYTHONPATH."""
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(__file__, folder / "faulty_backend.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    entry = f"[confidantd.backends]\n{NAME} = faulty_backend:backend\n"
    (info / "entry_points.txt").write_text(entry)
    return folder
