"""A stage worker subprocess as seen from its daemon."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from confidantd.errors import WorkerError
from confidantd.jobs.subprocesses import last_line, open_log
from confidantd.wire.worker import (
    LENGTH,
    MAX_PIPE_BYTES,
    Command,
    Event,
    Failed,
    decode_message,
    encode_message,
    event_from,
)

STOP_SECONDS = 3.0  # after closing the pipe; then the process is killed


class WorkerProcess:
    """One subprocess; may only be started once."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, log: Path) -> WorkerProcess:
        """Start the worker; what it writes to standard error goes to `log`."""
        with await asyncio.to_thread(open_log, log) as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "confidantd.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    async def send(self, command: Command) -> None:
        """Write a command; `WorkerError` when the worker has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode_message(command))
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerError("the worker has ended") from None

    async def events(self) -> AsyncIterator[Event]:
        """Every event until the worker ends; an end without `Stop` gives a last `Failed`."""
        assert self._process.stdout is not None
        failed = False
        try:
            while True:
                (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
                if length > MAX_PIPE_BYTES:
                    break
                event = event_from(decode_message(await self._process.stdout.readexactly(length)))
                failed = failed or isinstance(event, Failed)
                yield event
        except asyncio.IncompleteReadError:
            pass
        status = await self._process.wait()
        if status != 0 and not failed:
            yield Failed("worker-failed", self._explain(status), f"its output is in {self._log}")

    async def stop(self) -> None:
        """Close the pipe, which ends the worker; kill it if it does not end in time."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def kill(self) -> None:
        """End the worker at once."""
        if self._process.returncode is None:
            self._process.kill()

    def _explain(self, status: int) -> str:
        if status == -signal.SIGKILL:
            return "the worker was killed, as the system does when memory runs out"
        if status < 0:
            return f"the worker was ended by signal {-status}"
        return f"the worker ended with status {status} ({last_line(self._log)})"
