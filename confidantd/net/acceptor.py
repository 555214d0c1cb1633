"""Accepts TCP connections and finishes their TLS handshake before a byte of HTTP is read.

A stranger gets no further than that: its handshake fails and its connection is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable

from confidantd.errors import NotPairedError
from confidantd.ids import DeviceId
from confidantd.net.tls import peer_device_id
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKES = 64  # under way at once; more are dropped, so a flood costs little memory
LOG_SECONDS = 10.0  # a stranger that keeps trying fills no log
ACCEPT_PAUSE_SECONDS = 0.5  # when the process is out of file descriptors
SHUTDOWN_SECONDS = 1.0


class Acceptor:
    """Gives connections of trusted devices to `protocol` (an aiohttp server)."""

    def __init__(
        self,
        protocol: Callable[[], asyncio.BaseProtocol],
        context: Callable[[], Awaitable[ssl.SSLContext]],
        trusted: Callable[[DeviceId], bool],
    ) -> None:
        self._protocol = protocol
        self._context = context
        self._trusted = trusted
        self._tasks = TaskSet("accept")
        self._open: dict[asyncio.BaseTransport, DeviceId] = {}
        self._quiet_until = 0.0

    def start(self, listener: socket.socket) -> None:
        """Accept from `listener` until `close`."""
        self._tasks.start(self._accept(listener), f"port-{listener.getsockname()[1]}")

    async def close(self) -> None:
        """Accept no more. Connections that are open belong to the protocol."""
        await self._tasks.close()

    def drop_untrusted(self) -> None:
        """End every connection of a device that is trusted no longer."""
        for transport, device in list(self._open.items()):
            if transport.is_closing():
                del self._open[transport]
            elif not self._trusted(device):
                _abort(transport)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as failure:
                _log.warning("no connection can be accepted: %s", failure)
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._tasks) > MAX_HANDSHAKES:
                connection.close()
                continue
            self._tasks.start(self._handshake(connection, str(address[0])), "handshake")

    async def _handshake(self, connection: socket.socket, host: str) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                connection,
                ssl=await self._context(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        except OSError as failure:  # ssl.SSLError and time limits are OSErrors too
            connection.close()
            self._refused(host, failure)
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        self._check(transport, host)

    def _check(self, transport: asyncio.BaseTransport, host: str) -> None:
        try:
            device = peer_device_id(transport.get_extra_info("ssl_object"))
            if not self._trusted(device):
                raise NotPairedError("the device is trusted no longer")
        except NotPairedError as failure:
            _abort(transport)
            self._refused(host, failure)
            return
        self._open = {t: d for t, d in self._open.items() if not t.is_closing()}
        self._open[transport] = device

    def _refused(self, host: str, failure: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_SECONDS
            _log.debug("refused a connection from %s: %s", host, failure)


def _abort(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.Transport):
        transport.abort()
    else:
        transport.close()
