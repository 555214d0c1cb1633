"""What a test may not leave behind: tasks, threads, processes, sockets, network namespaces."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

GRACE_SECONDS = 10.0  # an ending thread or process may need a moment on a busy machine
MARK_NAME = "TEST_RUN_MARK"  # inherited by every process that a test starts, orphans included
NAMESPACES = Path("/run/netns")
OPEN_SOCKETS = Path("/proc/self/fd")

# Threads that libraries keep for the life of the process.
LIBRARY_THREADS = (
    "TMonitor",  # tqdm, below transformers
    "ThreadPoolExecutor-",  # torch's compile pool; asyncio's own are called `asyncio_`
)
LIBRARY_PROCESSES = ("multiprocessing.resource_tracker",)  # the standard library's, one a process


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was there before a test."""

    threads: frozenset[threading.Thread]
    processes: frozenset[int]
    sockets: frozenset[str]
    namespaces: frozenset[str]


@dataclass(slots=True)
class LeftTasks:
    """Tasks that were still running when an event loop ended."""

    names: list[str] = field(default_factory=list)


def mark_this_run() -> None:
    """Give this process, and so every one it starts, a mark of its own."""
    os.environ[MARK_NAME] = secrets.token_hex(8)


def take_snapshot() -> Snapshot:
    """What is there now."""
    return Snapshot(
        frozenset(threading.enumerate()),
        frozenset(process.pid for process in _marked_processes()),
        frozenset(_sockets()),
        frozenset(_namespaces()),
    )


def differences(before: Snapshot) -> list[str]:
    """One line for each thing that is there now, was not before, and does not end soon.

    Processes left behind are killed, so that they do not disturb the next test.
    """
    return [
        *_left_threads(before.threads),
        *_left_processes(before.processes),
        *_left_sockets(before.sockets),
        *(f"network namespace {name}" for name in _namespaces() - before.namespaces),
    ]


@contextmanager
def watch_tasks() -> Iterator[LeftTasks]:
    """Note every task that `asyncio.run` would have to cancel when its main coroutine ends."""
    left = LeftTasks()
    original = asyncio.Runner.close

    def close(runner: asyncio.Runner) -> None:
        left.names += _running(runner)
        original(runner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Runner, "close", close)
        yield left


def _running(runner: asyncio.Runner) -> list[str]:
    try:
        loop = runner.get_loop()
    except RuntimeError:  # closed before
        return []
    return [f"task {task.get_name()}" for task in asyncio.all_tasks(loop) if not task.done()]


def _left_threads(before: Iterable[threading.Thread]) -> list[str]:
    left = []
    for thread in set(threading.enumerate()) - set(before):
        if thread.name.startswith(LIBRARY_THREADS):
            continue
        thread.join(GRACE_SECONDS)
        if thread.is_alive():
            left.append(f"thread {thread.name}")
    return left


def _left_processes(before: frozenset[int]) -> list[str]:
    new = [process for process in _marked_processes() if process.pid not in before]
    _, alive = psutil.wait_procs(new, GRACE_SECONDS) if new else ((), ())
    left = []
    for process in alive:
        try:
            command = " ".join(process.cmdline())[:120]
            process.kill()
        except psutil.Error:
            continue
        left.append(f"process {process.pid}: {command}")
    return left


def _marked_processes() -> list[psutil.Process]:
    mark = os.environ[MARK_NAME]
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _belongs(process, mark)
    ]


def _belongs(process: psutil.Process, mark: str) -> bool:
    try:
        if process.environ().get(MARK_NAME) != mark:
            return False
        command = " ".join(process.cmdline())
    except (psutil.Error, OSError):  # ended, a zombie, or another user's
        return False
    return not any(known in command for known in LIBRARY_PROCESSES)


def _left_sockets(before: frozenset[str]) -> list[str]:
    return [f"open {name}" for name in _settled(lambda: _sockets() - before)]


def _settled(found: Callable[[], set[str]]) -> set[str]:
    """What is left after garbage collection: an unreachable socket warns by itself."""
    if found():
        gc.collect()
    return found()


def _sockets() -> set[str]:
    names = set()
    for entry in OPEN_SOCKETS.iterdir() if OPEN_SOCKETS.is_dir() else ():
        try:
            target = str(entry.readlink())
        except OSError:  # closed meanwhile: the listing's own descriptor
            continue
        if target.startswith("socket:"):
            names.add(target)
    return names


def _namespaces() -> set[str]:
    """Those whose name holds our process id, as ours do: others may run tests here too."""
    if not NAMESPACES.is_dir():
        return set()
    mine = f"{os.getpid() % 100_000}x"
    return {entry.name for entry in NAMESPACES.iterdir() if mine in entry.name}
