"""The control API as the CLI sees it: JSON over the daemon's Unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from confidantd.errors import ConfidantError, DaemonNotRunningError, from_wire

ANSWER_SECONDS = 90.0  # a plan may wait for an election
SOCKET_NAME = "control.sock"
MAX_LINE_BYTES = 16 * 1024 * 1024


class Client:
    """One CLI command's connection to the daemon; use as an async context manager."""

    def __init__(self, home: Path) -> None:
        self._socket = home / SOCKET_NAME

    async def __aenter__(self) -> Client:
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
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST."""
        return await self._ask("POST", path, body or {})

    async def delete(self, path: str) -> dict[str, Any]:
        """The answer to a DELETE."""
        return await self._ask("DELETE", path, None)

    async def stream(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """The JSON lines of a streamed answer."""
        limits = aiohttp.ClientTimeout(total=None)
        try:
            async with self._session.request(method, path, json=body, timeout=limits) as answer:
                if answer.status >= 400:
                    raise from_wire((await answer.json()).get("error", {}))
                async for line in answer.content:
                    yield json.loads(line)
        except (aiohttp.ClientError, OSError) as failure:
            raise self._explain(failure) from None

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        limits = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with self._session.request(method, path, json=body, timeout=limits) as answer:
                fields: dict[str, Any] = await answer.json()
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            raise self._explain(failure) from None
        if answer.status >= 400:
            raise from_wire(fields.get("error", {}))
        return fields

    def _explain(self, failure: Exception) -> ConfidantError:
        home = self._socket.parent
        if isinstance(failure, aiohttp.ClientConnectorError | FileNotFoundError):
            cause = getattr(failure, "os_error", failure)
            if isinstance(cause, PermissionError):
                return DaemonNotRunningError(
                    f"the daemon of {home} belongs to another user", "name your own with --home"
                )
            return DaemonNotRunningError(
                f"no daemon is running for {home}", "start it: confidantd, or name its --home"
            )
        if isinstance(failure, TimeoutError | asyncio.TimeoutError):
            return ConfidantError("the daemon did not answer in time", "see its log")
        return DaemonNotRunningError("the daemon ended while it was asked", "start confidantd again")
