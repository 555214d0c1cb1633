"""The backends that work on a stage, until one fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.blocks import FusedBlocks
from confidantd.engine.split.parts import BackendPrograms, BackendThread, own_cores, places
from confidantd.errors import BackendError
from confidantd.wire.worker import SplitChosen

LEFT_OUT = "backend-left-out"
NO_COUNT = -1  # a size that no program is made for
UNITS = ("attention", "mlp", "head")


def left_out_line(name: str, reason: str) -> str:
    """What a person is told about a backend that a job goes on without."""
    return f"{name} is left out and the job goes on without it ({reason})"


class Report(Protocol):
    """Who hears what the backends of a stage do."""

    def notice(self, code: str, message: str) -> None:
        """Something a person should know; the stage goes on."""
        ...

    def measuring(self, done: int, of: int) -> None:
        """So many of all measurements are done."""
        ...

    def chosen(self, split: SplitChosen) -> None:
        """Who computes what from now on."""
        ...


class Team:
    """Backends in order, the CPU's first, each with its programs and a thread.

    `threads` are those of the stage: a backend alone has all of them, together those on
    the CPU share them and the cores.
    """

    def __init__(
        self, backends: Sequence[Backend], paths: Mapping[str, Path], threads: int, report: Report
    ) -> None:
        self._kinds = {b.name: b.kind for b in backends}
        self._allowed = threads
        found = places(list(self._kinds.values()), threads, own_cores())
        self._paths = paths
        self._report = report
        self.cpu = BackendPrograms(CpuBackend(), paths, threads)
        self._whole = {b.name: BackendPrograms(b, paths, threads) for b in backends}
        self._whole[CpuBackend.name] = self.cpu
        together = list(zip(backends, found, strict=True))
        self._parts = {b.name: BackendPrograms(b, paths, p.threads) for b, p in together}
        self._threads = {b.name: BackendThread(b.name, p.cores) for b, p in together}
        self._fused: dict[str, FusedBlocks] = {}
        self._ended: dict[str, float] = {}  # busy seconds of whole blocks that were forgotten
        self._taken: dict[str, float] = {}
        self.left_out: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Backends that have not failed."""
        return tuple(name for name in self._parts if name not in self.left_out)

    def parts(self, name: str) -> BackendPrograms:
        """A backend's programs for shares."""
        return self._parts[name]

    def whole(self, name: str) -> BackendPrograms:
        """A backend's programs when it works alone, with all threads."""
        return self._whole[name]

    def thread(self, name: str) -> BackendThread:
        """A backend's thread."""
        return self._threads[name]

    def fused(self, name: str) -> FusedBlocks:
        """Whole blocks on one backend; raises BackendError if it cannot run them."""
        if name not in self._fused:
            programs = {n: self._whole[name].get(n) for n in FusedBlocks.PROGRAMS}
            self._fused[name] = FusedBlocks(programs, name)
        return self._fused[name]

    def drop_whole(self, kept: str | None = None) -> None:
        """Forget the programs of whole blocks, but not those of the backend `kept`."""
        for name, programs in self._whole.items():
            if name != kept:
                programs.drop_all_but({FusedBlocks.UNIT: NO_COUNT})
                if name in self._fused:
                    ended = self._fused.pop(name).busy_seconds
                    self._ended[name] = self._ended.get(name, 0.0) + ended

    def drop_parts(self) -> None:
        """Forget the programs of shares, those too with which the CPU stood in for a backend."""
        for programs in (*self._parts.values(), self.cpu):
            programs.drop_all_but(dict.fromkeys(UNITS, NO_COUNT))

    def can_split(self, program: str) -> bool:
        """Whether there are several backends, a thread for each of them that is on the CPU, and
        the stage was given programs of parts.
        """
        on_cpu = sum(self._kinds[name] == "cpu" for name in self.names)
        return len(self.names) > 1 and on_cpu <= self._allowed and program in self._paths

    def leave_out(self, name: str, failure: BackendError) -> None:
        """Go on without a backend, and free what it holds; said once."""
        if name in self.left_out:
            return
        self.left_out.append(name)
        for programs in (self._parts[name], self._whole[name]):
            programs.drop_all_but(dict.fromkeys((*UNITS, FusedBlocks.UNIT), NO_COUNT))
        self._report.notice(LEFT_OUT, left_out_line(name, failure.message))

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each backend has computed since the last call, alone and in parts."""
        found = {}
        for name, thread in self._threads.items():
            total = thread.busy_seconds + self._ended.get(name, 0.0)
            if name in self._fused:
                total += self._fused[name].busy_seconds
            found[name] = total - self._taken.get(name, 0.0)
            self._taken[name] = total
        return found

    def close(self) -> None:
        """End every thread."""
        for thread in self._threads.values():
            thread.close()
