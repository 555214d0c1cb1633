"""Tasks with names and owners: nothing runs that nobody awaits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from confidantd.errors import ConfidantError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

RESTART_FIRST_SECONDS = 0.5
RESTART_MOST_SECONDS = 30.0


class TaskSet:
    """Short-lived tasks of one owner; `close` cancels what is left and waits for it.

    A task that fails is logged once, under its name; the others go on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        """Run `work` as a task called `<owner>.<name>`."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def close(self) -> None:
        """Cancel every task and wait until each has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self) -> None:
        """Wait until every task has ended by itself."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def __len__(self) -> int:
        return len(self._tasks)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        failure = task.exception()
        if isinstance(failure, ConfidantError):
            _log.warning("%s: %s", task.get_name(), failure)
        elif failure is not None:
            _log.error("%s failed", task.get_name(), exc_info=failure)


async def supervise(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a service for ever: when it fails, log it and restart after a growing pause.

    The pause goes back to its first value once a run lasted longer than the longest pause.
    """
    loop = asyncio.get_running_loop()
    pause = RESTART_FIRST_SECONDS
    while True:
        started = loop.time()
        try:
            await run()
            return
        except (ConfidantError, OSError) as failure:
            _log.warning("%s stopped: %s; starting it again in %.1f s", name, failure, pause)
        if loop.time() - started > RESTART_MOST_SECONDS:
            pause = RESTART_FIRST_SECONDS
        await asyncio.sleep(pause)
        pause = min(pause * 2, RESTART_MOST_SECONDS)


async def plain_errors(work: Awaitable[_T]) -> _T:
    """Await `work`; of an exception group raise the first single exception instead."""
    try:
        return await work
    except BaseExceptionGroup as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from None
