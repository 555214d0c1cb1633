"""Accepts TCP connections and finishes their TLS handshake before a byte of HTTP is read.

A stranger gets no further than that: its handshake fails and its connection is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

from confidantd.errors import ConfidantError, NotPairedError, ProtocolError
from confidantd.ids import DeviceId
from confidantd.net.allowance import Allowance, Allowances
from confidantd.net.tls import peer_device_id, unsent_alert
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
# Under way at once, of strangers, and of one strange host; more are dropped, so that a flood costs
# little memory. Members open several at once when they fetch a stage.
MAX_HANDSHAKES, MAX_OF_STRANGERS, MAX_OF_HOST = 16, 6, 4
# A handshake costs a millisecond of a laptop's core, ten of a phone's. Hosts from which members
# came may make some; all others together as many as a person would ever need.
MEMBER_HANDSHAKES = (2.0, 30.0)  # of one host: a second, and at once
STRANGER_HANDSHAKES = (5.0, 30.0)
EACH_STRANGER = (1.0, 10.0)
REMEMBERED_HOSTS = 256
# That many are dropped at once before the next ones are taken from the queue a little later: what
# does not fit into the queue, the kernel drops.
DROPPED_AT_ONCE, FLOOD_PAUSE_SECONDS = 10, 0.05
COLLECTED_AT_ONCE = 16
MAX_OPEN = 10  # connections of one device: one to talk, and some that fetch
LOG_SECONDS = 10.0  # a stranger that keeps trying fills no log
ACCEPT_PAUSE_SECONDS = 0.5  # when the process is out of file descriptors
SHUTDOWN_SECONDS = 1.0


class Acceptor:
    """Gives connections of welcome devices to `protocol` (an aiohttp server)."""

    def __init__(
        self,
        protocol: Callable[[], asyncio.BaseProtocol],
        context: Callable[[], Awaitable[ssl.SSLContext]],
        welcome: Callable[[DeviceId], bool],
    ) -> None:
        self._protocol = protocol
        self._context = context
        self._welcome = welcome
        self._tasks = TaskSet("accept")
        self._open: dict[asyncio.BaseTransport, DeviceId] = {}
        self._listeners: list[socket.socket] = []
        self._unfinished: set[socket.socket] = set()
        self._quiet_until = 0.0
        self._members = Allowances(*MEMBER_HANDSHAKES, remembered=REMEMBERED_HOSTS)
        self._strangers = Allowance(*STRANGER_HANDSHAKES)
        self._each = Allowances(*EACH_STRANGER, remembered=REMEMBERED_HOSTS)
        self._of_strangers = self._dropped = self._refusals = 0
        self._of_host: Counter[str] = Counter()
        self._known: OrderedDict[str, None] = OrderedDict()  # hosts of members

    def start(self, listener: socket.socket) -> None:
        """Accept from `listener` until `close`."""
        self._listeners.append(listener)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def close(self) -> None:
        """Accept no more and close the listeners. Open connections belong to the protocol."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        await self._tasks.close()
        for connection in self._unfinished:  # of tasks that ended before their first step
            connection.close()

    def abort_all(self) -> None:
        """End what is still open without waiting for the other sides."""
        for transport in self._open:
            _abort(transport)

    def drop_unwelcome(self) -> None:
        """End every connection of a device that is welcome no longer."""
        for transport, device in list(self._open.items()):
            if transport.is_closing():
                del self._open[transport]
            elif not self._welcome(device):
                _abort(transport)

    def _accept(self, listener: socket.socket) -> None:
        """Called by the loop when a connection waits."""
        try:
            connection, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it went away again
        except OSError as failure:
            _log.warning("no connection can be accepted: %s", failure)
            self._pause(listener, ACCEPT_PAUSE_SECONDS)
            return
        host = str(address[0])
        if not self._may_try(host):
            connection.close()
            self._dropped += 1
            if self._dropped % DROPPED_AT_ONCE == 0:
                self._pause(listener, FLOOD_PAUSE_SECONDS)
            return
        connection.setblocking(False)
        self._unfinished.add(connection)
        self._tasks.start(self._counted(connection, host, host not in self._known), "handshake")

    def expect(self, host: str) -> None:
        """A member was there: it does not count among strangers."""
        self._known[host] = None
        self._known.move_to_end(host)
        while len(self._known) > REMEMBERED_HOSTS:
            self._known.popitem(last=False)

    def _may_try(self, host: str) -> bool:
        """Most of the places are kept free of strangers, and one of them does not take all of
        theirs.
        """
        now = asyncio.get_running_loop().time()
        if host in self._known:
            return len(self._unfinished) < MAX_HANDSHAKES and self._members.take(host, now)
        free = self._of_strangers < MAX_OF_STRANGERS and self._of_host[host] < MAX_OF_HOST
        return free and self._each.take(host, now) and self._strangers.take(now)

    async def _counted(self, connection: socket.socket, host: str, stranger: bool) -> None:
        self._of_strangers += stranger
        self._of_host[host] += 1
        try:
            await self._handshake(connection, host)
        finally:
            self._of_strangers -= stranger
            self._of_host[host] -= 1
            self._of_host += Counter()  # drops hosts without one

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        """Those that wait would wake the loop again at once."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        self._tasks.start(self._resume(listener, seconds), "resume")

    async def _resume(self, listener: socket.socket, seconds: float) -> None:
        await asyncio.sleep(seconds)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _handshake(self, connection: socket.socket, host: str) -> None:
        spare = connection.dup()  # outlives asyncio's own, for the alert
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
            _send_alert(spare, failure)
            self._refused(host, failure)
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        finally:
            spare.close()
            self._unfinished.discard(connection)
        self._check(transport, host)

    def _check(self, transport: asyncio.BaseTransport, host: str) -> None:
        try:
            device = peer_device_id(transport.get_extra_info("ssl_object"))
            if not self._welcome(device):
                raise NotPairedError("the device is not welcome (any more)")
            self._open = {t: d for t, d in self._open.items() if not t.is_closing()}
            if sum(d == device for d in self._open.values()) >= MAX_OPEN:
                raise ProtocolError(f"it has {MAX_OPEN} connections already")
        except ConfidantError as failure:
            _abort(transport)
            self._refused(host, failure)
            return
        self._open[transport] = device
        self.expect(host)

    def _refused(self, host: str, failure: Exception) -> None:
        self._refusals += 1
        if self._refusals % COLLECTED_AT_ONCE == 0:  # a TLS connection is a cycle of 150 KB
            gc.collect()
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_SECONDS
            _log.debug("refused a connection from %s: %s", host, failure)


def _send_alert(connection: socket.socket, failure: OSError) -> None:
    alert = unsent_alert(failure)
    if alert:
        with contextlib.suppress(OSError):  # the other side may be gone
            connection.send(alert)


def _abort(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.Transport):
        transport.abort()
    else:
        transport.close()
