"""The worker of one stage: loaded again and again as the job's plan changes, heard all the time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from confidantd.errors import WorkerError, from_wire
from confidantd.jobs.worker_process import WorkerProcess
from confidantd.wire.codec import to_map
from confidantd.wire.jobs import StageStarted
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Command, Event, Failed, Listening, Load, Loaded, Measuring

HEARD_SECONDS = 5.0
LOAD_SECONDS = 300.0  # a phone reads a 1 GB stage from its flash in about a minute

Hear = Callable[[StageAssignment, Event], Awaitable[None]]


class StageProcess:
    """One worker process and what it is at; may only be started once."""

    def __init__(self, process: WorkerProcess, hear: Hear) -> None:
        self._process = process
        self._hear = hear
        self._assignment: StageAssignment | None = None
        self._loading: StageAssignment | None = None
        self._started: dict[type[Event], asyncio.Future[Event]] = {}
        self._limit: asyncio.Timeout | None = None
        self._heard = asyncio.Event()

    @classmethod
    async def start(cls, log: Path, hear: Hear) -> StageProcess:
        """A process that has nothing to do yet; `hear` gets its events, in order."""
        return cls(await WorkerProcess.start(log), hear)

    @property
    def assignment(self) -> StageAssignment | None:
        """What it was loaded with last."""
        return self._assignment

    async def load(self, load: Load) -> StageStarted:
        """Load a stage, the first one or another one; raises what the worker says."""
        loop = asyncio.get_running_loop()
        self._started = {kind: loop.create_future() for kind in (Listening, Loaded)}
        self._loading = load.assignment
        await self._process.send(load)
        try:
            async with asyncio.timeout(LOAD_SECONDS) as self._limit:
                listening = await self._started[Listening]
                loaded = await self._started[Loaded]
        except TimeoutError:
            raise WorkerError(f"the stage did not load within {LOAD_SECONDS:.0f} s") from None
        finally:
            self._limit = None
        assert isinstance(listening, Listening)
        assert isinstance(loaded, Loaded)
        return StageStarted(listening.port, loaded.resident_bytes)

    async def send(self, command: Command) -> None:
        """Any other command; `WorkerError` when the worker has ended."""
        await self._process.send(command)

    async def run(self) -> None:
        """Hear events until the worker ends; who waits for it to load then waits no longer."""
        try:
            await self._hear_all()
        finally:
            self._fail_load(Failed("worker-failed", "the worker was stopped", ""))
            self._heard.set()

    async def _hear_all(self) -> None:
        async for event in self._process.events():
            if isinstance(event, Measuring):
                self._go_on()
            if isinstance(event, Listening):  # what came before is of the epoch before
                self._assignment = self._loading
            waiter = self._started.get(type(event))
            if waiter is not None and not waiter.done():
                waiter.set_result(event)
            elif not (isinstance(event, Failed) and self._fail_load(event)):
                place = self._assignment or self._loading
                assert place is not None
                await self._hear(place, event)

    async def heard(self) -> None:
        """Until all it said was taken; not for ever: nothing may be heard any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARD_SECONDS):
                await self._heard.wait()

    async def stop(self) -> None:
        """End the process."""
        await self._process.stop()

    def _go_on(self) -> None:
        """A stage that measures its backends is at work: its time to load begins anew."""
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time() + LOAD_SECONDS)

    def _fail_load(self, event: Failed) -> bool:
        """Give a failure to `load` if it still waits; False if nobody does."""
        waiting = [future for future in self._started.values() if not future.done()]
        for future in waiting:
            future.set_exception(from_wire(to_map(event)))
            future.exception()  # a second waiter may never look: not worth a warning
        return bool(waiting)
