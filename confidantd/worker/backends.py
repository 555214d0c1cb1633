"""The backends a worker uses, and where it remembers how they shared out its blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from confidantd.engine.backends.base import Backend, first_line
from confidantd.engine.backends.registry import load_backends
from confidantd.engine.split.team import LEFT_OUT, left_out_line
from confidantd.errors import BackendError, StorageError
from confidantd.store.files import write_atomically
from confidantd.wire.worker import Event, Measuring, Notice, SplitChosen

_log = logging.getLogger(__name__)


class PipeReport:
    """Sends what the backends do to the daemon."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send

    def notice(self, code: str, message: str) -> None:
        """Something a person should know."""
        self._send(Notice(code, message))

    def measuring(self, done: int, of: int) -> None:
        """Progress of a measurement."""
        self._send(Measuring(done, of))

    def chosen(self, split: SplitChosen) -> None:
        """Who computes what from now on."""
        self._send(split)


class SplitFile:
    """The profile of a block shape in the daemon's home; an empty path remembers nothing."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None

    def read(self) -> bytes | None:
        """None if there is none yet."""
        try:
            return None if self._path is None else self._path.read_bytes()
        except OSError:
            return None

    def write(self, data: bytes) -> None:
        """A profile that cannot be kept is measured again next time."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, data)
        except (StorageError, OSError) as failure:
            _log.warning("how backends share blocks is not remembered: %s", failure)

    def of_head(self) -> SplitFile:
        """A file beside this one."""
        return SplitFile("" if self._path is None else f"{self._path.with_suffix('')}-head.json")


def chosen_backends(names: tuple[str, ...], report: PipeReport) -> list[Backend]:
    """The backends with these names that work here; the CPU's always, and first."""
    backends, problems = load_backends()
    for problem in problems:
        if problem.name in names:
            _left_out(problem.name, problem.message, report)
    found = [backend for backend in backends if backend.name in (*names, "cpu")]
    return [backend for backend in found if _works(backend, report)]


def _works(backend: Backend, report: PipeReport) -> bool:
    try:
        backend.probe()
    except BackendError as failure:
        _left_out(backend.name, failure.message, report)
        return False
    except Exception as failure:  # noqa: BLE001  # code of a plugin: it may raise anything
        _left_out(backend.name, f"{type(failure).__name__}: {first_line(failure)}", report)
        return False
    return True


def _left_out(name: str, message: str, report: PipeReport) -> None:
    report.notice(LEFT_OUT, left_out_line(name, message))
