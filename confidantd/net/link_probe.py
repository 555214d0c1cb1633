"""Measures the bandwidth from a peer to this device by a short transfer: `GET /v1/link`.

It has a TCP connection of its own, as blobs have: in the control connection heartbeats would
wait behind it. The reader stops as soon as it knows enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable

import aiohttp
from aiohttp import web

from confidantd.errors import PeerLostError
from confidantd.net.dialer import bracketed, translated
from confidantd.net.link_timing import LinkTiming

LINK_PATH = "/v1/link"
MAX_LINK_BYTES = 8 * 1024 * 1024  # a gigabit link is through in 0.07 s
LINK_SECONDS = 8.0  # with the handshake; the timing itself ends after 3
_BLOCK_BYTES = 64 * 1024


class LinkProbe:
    """Both ends of measuring. One at a time: two would share the radio and measure halves.

    `occupied` says whether this device transfers something else now.
    """

    def __init__(self, occupied: Callable[[], bool]) -> None:
        self._occupied = occupied
        self._running = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Send until the reader has enough; 503 while a measurement would tell nothing."""
        if self._running or self._occupied():
            raise web.HTTPServiceUnavailable
        self._running = True
        try:
            return await _send(request)
        finally:
            self._running = False

    async def measure(
        self, session: aiohttp.ClientSession, context: ssl.SSLContext, address: tuple[str, int]
    ) -> float:
        """Mbit/s from the device at `address`; `PeerLostError` if it cannot be told now."""
        where = f"{bracketed(address[0])}:{address[1]}"
        if self._running or self._occupied():
            raise PeerLostError("this device transfers something else now", "try again later")
        self._running = True
        try:
            async with translated(where, LINK_SECONDS):
                found = await _receive(session, context, where)
        finally:
            self._running = False
        if found is None:
            raise PeerLostError(f"{where} sends nothing to measure the link by now")
        return found


async def _send(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = "application/octet-stream"
    response.content_length = MAX_LINK_BYTES
    block = await asyncio.to_thread(os.urandom, _BLOCK_BYTES)  # nothing on the way can shrink it
    with contextlib.suppress(TimeoutError, ConnectionError):  # the reader has enough, or is gone
        async with asyncio.timeout(LINK_SECONDS):
            await response.prepare(request)
            for _ in range(MAX_LINK_BYTES // _BLOCK_BYTES):
                await response.write(block)
            await response.write_eof()
            return response
    request.protocol.force_close()
    return response


async def _receive(
    session: aiohttp.ClientSession, context: ssl.SSLContext, where: str
) -> float | None:
    """Reads at most `MAX_LINK_BYTES`, and keeps none of them."""
    timing, clock = LinkTiming(), asyncio.get_running_loop().time
    left = MAX_LINK_BYTES
    async with session.get(f"https://{where}{LINK_PATH}", ssl=context) as response:
        if response.status != 200:
            return None
        async for data in response.content.iter_any():
            left -= len(data)
            if timing.add(len(data), clock()) or left <= 0:
                break
    return timing.mbps()
