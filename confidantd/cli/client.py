"""The control API as the CLI sees it: JSON over the daemon's Unix socket."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp

from confidantd.errors import ConfidantError, DaemonNotRunningError, from_wire

ANSWER_SECONDS = 90.0  # a plan may wait for an election
SOCKET_NAME = "control.sock"
OK = 200
MAX_LINE_BYTES = 16 * 1024 * 1024


class Client:
    """One CLI command's connection to the daemon; use as an async context manager."""

    def __init__(self, home: Path) -> None:
        self._socket = home / SOCKET_NAME

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            base_url="http://daemon",
            connector=aiohttp.UnixConnector(str(self._socket)),
            read_bufsize=MAX_LINE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET."""
        return await self.ask("GET", path)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST."""
        return await self.ask("POST", path, body or {})

    async def delete(self, path: str) -> dict[str, Any]:
        """The answer to a DELETE."""
        return await self.ask("DELETE", path)

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One answer; an error of the daemon is raised as itself."""
        limits = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with self._session.request(method, path, json=body, timeout=limits) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, OSError) as failure:
            raise self._explain(failure) from None
        return _fields(answer.status, content)

    async def server_events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON objects of a stream of events, up to its last."""
        async for line in self._lines("POST", path, body):
            data = line.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            yield _fields(OK, data)

    async def stream(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON lines of a streamed answer, however long it takes."""
        async for line in self._lines(method, path, body):
            yield _fields(OK, line)

    async def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[bytes, None]:
        """Those of an answer that are not empty; an error of the daemon is raised as itself."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_SECONDS)
        try:
            async with self._session.request(method, path, json=body, timeout=limits) as answer:
                if answer.status != OK:
                    _fields(answer.status, await answer.read())
                async for line in answer.content:
                    if line.strip():
                        yield line.strip()
        except (aiohttp.ClientError, OSError) as failure:
            raise self._explain(failure) from None

    def _explain(self, failure: Exception) -> ConfidantError:
        """What a failed connection means to the user."""
        home = self._socket.parent
        if isinstance(failure, TimeoutError):
            return ConfidantError("the daemon did not answer in time", "see its log")
        if not isinstance(failure, aiohttp.ClientConnectorError):
            return DaemonNotRunningError(
                "the daemon ended while it was asked", "start confidantd again"
            )
        if isinstance(failure.os_error, PermissionError):
            return DaemonNotRunningError(
                f"the daemon of {home} belongs to another user", "name your own with --home"
            )
        return DaemonNotRunningError(
            f"no daemon is running for {home}", "start it: confidantd, or name its --home"
        )


def _fields(status: int, content: bytes) -> dict[str, Any]:
    """The JSON object of an answer; raises the error in it."""
    try:
        fields = json.loads(content)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and isinstance(error := fields.get("error"), dict):
        raise from_wire(error)
    if not isinstance(fields, dict) or status != OK:
        raise ConfidantError(
            f"the daemon's answer is not understood (HTTP status {status})",
            "if another version of confidantd is running, restart it",
        )
    return fields
