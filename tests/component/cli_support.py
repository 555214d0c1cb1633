"""A daemon of canned answers on a real Unix socket, and the real CLI run against it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

START_SECONDS = 20.0
CLI_SECONDS = 60.0
SHUTDOWN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """What the CLI asked."""

    method: str
    path: str
    body: Any


@dataclass(frozen=True, slots=True)
class Held:
    """An answer that takes its time."""

    fields: dict[str, Any]
    until: threading.Event


@dataclass(slots=True)
class FakeDaemon:
    """Answers by `METHOD path`: a dict is JSON, a list is a stream of its items as lines.

    An `int` gives an empty answer of that HTTP status. A streamed `HANG` keeps the stream
    open until the client leaves; `hanging` is set when it is reached, `left` afterwards.
    A `Held` answer is given when its event is set.
    """

    home: Path
    answers: dict[str, Any]
    requests: list[Request] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        body = await request.json() if request.can_read_body else None
        self.requests.append(Request(request.method, request.raw_path, body))
        match self.answers.get(f"{request.method} {request.raw_path}"):
            case dict() as fields:
                return web.json_response(fields, status=400 if "error" in fields else 200)
            case list() as lines:
                return await self._stream(request, lines)
            case int() as status:
                return web.Response(status=status)
            case Held() as held:
                await asyncio.to_thread(held.until.wait, CLI_SECONDS)
                return web.json_response(held.fields)
            case _:
                return web.Response(status=404, text="404: Not Found")

    async def _stream(self, request: web.Request, lines: Sequence[Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            if line == HANG:
                await self._hang()
            await response.write(json.dumps(line).encode() + b"\n")
        await response.write_eof()
        return response

    async def _hang(self) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


HANG = "hang"


@contextmanager
def fake_daemon(home: Path, answers: Mapping[str, Any]) -> Iterator[FakeDaemon]:
    """Serve in a thread of its own, as the CLI is a process of its own."""
    home.mkdir(parents=True, exist_ok=True)
    daemon = FakeDaemon(home, dict(answers))
    started: threading.Event = threading.Event()
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", daemon.handle)
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS, access_log=None
        )
        await runner.setup()
        await web.UnixSite(runner, str(home / "control.sock")).start()
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake daemon")
    thread.start()
    try:
        assert started.wait(START_SECONDS)
        yield daemon
    finally:
        for stop in stops:
            stop()
        thread.join(START_SECONDS)


def environment(**more: str) -> dict[str, str]:
    """A terminal 80 wide and no settings of this shell."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CONFIDANT_", "NO_COLOR"))}
    return {**kept, "COLUMNS": "80", "LINES": "40", "TERM": "xterm", **more}


def command(*arguments: str) -> list[str]:
    """The command line of `confidant`."""
    return [sys.executable, "-m", "confidantd.cli.main", *arguments]


def confidant(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `confidant` for this home to its end."""
    return subprocess.run(
        command(*arguments, "--home", str(home)),
        capture_output=True,
        text=True,
        timeout=CLI_SECONDS,
        env=environment(**more),
        check=False,
    )
