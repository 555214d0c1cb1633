"""The network of this device: one TLS port, one control connection per peer, blob ranges."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

import confidantd
from confidantd.errors import (
    ConfidantError,
    IdentityConflictError,
    PeerLostError,
    UnexpectedDeviceError,
)
from confidantd.identity.certificate import Identity
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, Digest, short_id
from confidantd.net.acceptor import Acceptor
from confidantd.net.allowance import Allowances
from confidantd.net.blobs import BLOB_PATH, BlobServer, BlobSource, read_range
from confidantd.net.connection import Connection, NotifyHandler, RequestHandler, Socket
from confidantd.net.connections import Connections, DeviceListener, TwinListener
from confidantd.net.contexts import Contexts
from confidantd.net.dialer import (
    CLOSE_SECONDS,
    CONNECT_SECONDS,
    CONTROL_PATH,
    PING_SECONDS,
    bracketed,
    open_socket,
    translated,
)
from confidantd.net.duplicates import Origin
from confidantd.net.greeting import device_of, greet_back, greet_first
from confidantd.net.link_probe import LINK_PATH, LinkProbe
from confidantd.net.link_timing import TransferTiming
from confidantd.net.listen import bound_port, open_listeners
from confidantd.net.shunning import Shunning
from confidantd.tasks import TaskSet
from confidantd.wire.codec import MAX_MESSAGE_BYTES
from confidantd.wire.messages import MAX_ADDRESSES, PROTOCOL_VERSION, Hello, clean_name

_log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")

ConflictListener = Callable[[str], None]
TransferListener = Callable[[DeviceId, float], None]
MAX_HEADER_BYTES = 8_190
SHUTDOWN_SECONDS = 1.0
# Of this device's processor for the messages of one peer: a second, and at once.
PROCESSOR_SECONDS, MOST_PEERS = (0.025, 1.0), 512
BLOB_PAUSES = (0.3, 1.0)  # seconds, before a range is asked for again
MOST_TO_ONE = 6  # connections to one device at once, well below what it allows
MAX_GREETING = 2  # connections of one device: each may hold the bytes of a large message
FAREWELL_SECONDS = 0.3  # in which a removed device is told so, before its sockets are cut
LOOP_TURNS_TO_CLOSE = 3  # an aborted TLS transport closes its socket in the loop's next turns


class Network:
    """Control connections to paired devices. Handlers are registered before `run`.

    `instance` is random per object; `port` is known once `started` is set; `addresses`
    (`host:port` texts) are what this device tells peers about where it can be reached.
    """

    def __init__(
        self,
        identity: Identity,
        trust: TrustStore,
        hosts: Sequence[str],
        port: int | None,
        blobs: BlobSource,
        *,
        name: str = "",
    ) -> None:
        self.identity = identity
        self.name = clean_name(name) or short_id(identity.device_id)
        self.instance = secrets.token_hex(8)
        self.hosts = tuple(hosts)
        self.port = port or 0
        self.addresses: tuple[str, ...] = ()
        self.started = asyncio.Event()
        self._asked_port = port
        self._trust = trust
        self._contexts = Contexts(identity.home, trust)
        self._blobs = BlobServer(blobs)
        self._transfers = TransferTiming()
        self._transferred: list[TransferListener] = []
        self._probe = LinkProbe(lambda: self._blobs.running or self._transfers.running)
        self._requests: dict[str, RequestHandler] = {}
        self._notifications: dict[str, NotifyHandler] = {}
        self._connections = Connections()
        self._attempts = 0
        self._spent = Allowances(*PROCESSOR_SECONDS, remembered=MOST_PEERS)
        self._shunning = Shunning()
        self._greeting: Counter[DeviceId] = Counter()  # incoming ones that say who they are
        self._tasks = TaskSet("network")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._acceptor: Acceptor | None = None
        self._conflicts: list[ConflictListener] = []
        self._untrusted: list[DeviceListener] = []

    async def run(self) -> None:
        """Serve until cancelled. `PortTakenError` if the port asked for is in use."""
        listeners = await asyncio.to_thread(
            open_listeners, self.hosts, self._asked_port, self.identity.home
        )
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            logger=_http_log,
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            self.port = bound_port(listeners)
            await runner.setup()
            assert runner.server is not None
            self._acceptor = Acceptor(runner.server, self._contexts.listening, self._welcome)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit_per_host=MOST_TO_ONE),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            self._loop = asyncio.get_running_loop()
            self._trust.on_change(self._trust_changed_elsewhere)
            for listener in listeners:
                self._acceptor.start(listener)
            self.started.set()
            await self._loop.create_future()
        finally:
            self._trust.forget_listener(self._trust_changed_elsewhere)
            await self._stop(runner)
            for listener in listeners:
                listener.close()

    def on_request(self, method: str, handler: RequestHandler) -> None:
        """Answer `method`; a `ConfidantError` that `handler` raises is raised at the caller."""
        self._requests[method] = handler

    def on_notify(self, topic: str, handler: NotifyHandler) -> None:
        """Give notifications of `topic` to `handler`, in the order they were sent."""
        self._notifications[topic] = handler

    def on_connected(self, listener: DeviceListener) -> None:
        """Call when a device that had no connection has one."""
        self._connections.connected.append(listener)

    def on_disconnected(self, listener: DeviceListener) -> None:
        """Call when a device has no connection any more."""
        self._connections.disconnected.append(listener)

    def on_untrusted(self, listener: DeviceListener) -> None:
        """Call with a connected device that is trusted no longer, for a last message to it."""
        self._untrusted.append(listener)

    def expect(self, host: str) -> None:
        """A member was at this address: strangers do not keep it out."""
        if self._acceptor is not None:
            self._acceptor.expect(host)

    def on_conflict(self, listener: ConflictListener) -> None:
        """Call with the address of another device that has our very identity."""
        self._conflicts.append(listener)

    def on_twins(self, listener: TwinListener) -> None:
        """Call when two daemons use one peer's identity: with its id, now connected, and the
        address of the other one."""
        self._connections.twins.append(listener)

    def on_transfer(self, listener: TransferListener) -> None:
        """Call with a device and the Mbit/s at which a lot of data came from it."""
        self._transferred.append(listener)

    def connected(self) -> set[DeviceId]:
        """The devices with an open connection."""
        return self._connections.devices()

    def peer(self, device: DeviceId) -> Hello | None:
        """What a connected device said about itself."""
        connection = self._connections.get(device)
        return connection.peer if connection else None

    def address(self, device: DeviceId) -> tuple[str, int] | None:
        """Host of the connection to `device`, and the port where it listens."""
        connection = self._connections.get(device)
        return (connection.host, connection.peer.port) if connection else None

    async def connect(self, host: str, port: int, expect: DeviceId | None) -> DeviceId:
        """Dial once (limit 5 s); gives the id of who answered, which is now connected.

        Our own id means that we reached ourselves. `NotPairedError` if the device does not
        trust us or we not it, `UnexpectedDeviceError` if it is not `expect`;
        `PeerRefusedError` if nothing listens;
        `IdentityConflictError` if another daemon has our identity; else `PeerLostError`.
        """
        where = f"{host}:{port}"
        async with translated(where, CONNECT_SECONDS):
            session = self._require_session()
            socket = await open_socket(session, await self._contexts.dialling(), host, port)
            greeted = False
            try:
                device = device_of(socket.get_extra_info("ssl_object"))
                if left := self._shunning.left(device, time.monotonic()):
                    raise PeerLostError(
                        f"{where} talked nonsense and is left alone for {left:.0f} s"
                    )
                if not self._trusts(device) or expect not in (None, device):
                    raise UnexpectedDeviceError(
                        f"another device than the expected answers at {where}"
                    )
                hello = self._hello()
                peer = await greet_first(socket, device, hello)
                greeted = True
            finally:
                if not greeted:
                    await socket.close()
        if device == self.identity.device_id:
            await socket.close()
            self._check_self(peer, host)
            return device
        origin = Origin(self.identity.device_id, hello.attempt, peer.instance)
        connection = self._connection(socket, peer, origin, host)
        self._tasks.start(self._serve(connection), f"to-{short_id(device)}")
        return device

    def disconnect(self, device: DeviceId, reason: str) -> None:
        """End the connection to `device`, if there is one."""
        self._connections.end(device, reason)

    def shun(self, device: DeviceId, reason: str) -> None:
        """End the connection to a device that breaks the rules, and take none for a while."""
        self._shunning.offended(device, time.monotonic())
        self.disconnect(device, reason)

    async def request(
        self, device: DeviceId, method: str, params: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        """The answer of `device`; raises the error it answered with, or `PeerLostError`."""
        connection = self._connections.get(device)
        if connection is None:
            raise PeerLostError(
                f"the device {short_id(device)} is not connected", "see `confidant peers`"
            )
        return await connection.request(method, params, timeout_seconds)

    async def notify(self, device: DeviceId, topic: str, params: dict[str, Any]) -> bool:
        """Send without waiting for an answer; False if the device is not connected."""
        return self.send(device, topic, params)

    def send(self, device: DeviceId, topic: str, params: dict[str, Any]) -> bool:
        """`notify` from synchronous code."""
        connection = self._connections.get(device)
        return connection is not None and connection.notify(topic, params)

    async def read_blob(self, device: DeviceId, digest: Digest, offset: int, length: int) -> bytes:
        """`length` bytes (at most 4 MiB) of a blob that a connected device has."""
        pauses = deque(BLOB_PAUSES)
        while True:
            try:
                return await self._read_blob(device, digest, offset, length)
            except PeerLostError:
                # a device that is there may have had too many connections at once
                if not pauses or self._connections.get(device) is None:
                    raise
            await asyncio.sleep(pauses.popleft())

    async def _read_blob(self, device: DeviceId, digest: Digest, offset: int, length: int) -> bytes:
        address = self._require_address(device)
        context = await self._contexts.to(device)
        session, clock = self._require_session(), asyncio.get_running_loop().time
        data, alone = b"", False
        self._transfers.began(device, clock())
        try:
            data, shared = await read_range(
                session, context, address, digest, offset=offset, length=length
            )
            alone = not shared
        finally:
            mbps = self._transfers.ended(device, len(data), clock(), alone=alone)
        if mbps is not None:
            for listener in self._transferred:
                listener(device, mbps)
        return data

    async def measure_link(self, device: DeviceId) -> float:
        """Mbit/s from a connected device to this one, by a transfer of a second or so.

        `PeerLostError` if it cannot be told now: either of the two transfers something else.
        """
        address = self._require_address(device)
        context = await self._contexts.to(device)
        return await self._probe.measure(self._require_session(), context, address)

    def _application(self) -> web.Application:
        app = web.Application(handler_args={"max_field_size": MAX_HEADER_BYTES})
        app.router.add_get(CONTROL_PATH, self._control)
        app.router.add_get(BLOB_PATH + "/{digest}", self._blob)
        app.router.add_get(LINK_PATH, self._link)
        return app

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        return await self._blobs.handle(request, self._member(request))

    async def _link(self, request: web.Request) -> web.StreamResponse:
        self._member(request)
        return await self._probe.handle(request)

    def _member(self, request: web.Request) -> DeviceId:
        """The trusted peer that asks for data."""
        device = device_of(request.get_extra_info("ssl_object"))
        if device == self.identity.device_id or not self._trusts(device):
            raise web.HTTPForbidden
        return device

    async def _control(self, request: web.Request) -> web.WebSocketResponse:
        """An incoming control connection: greet, then serve until it ends."""
        socket = web.WebSocketResponse(
            compress=False,
            heartbeat=PING_SECONDS,
            max_msg_size=MAX_MESSAGE_BYTES,
            timeout=CLOSE_SECONDS,
        )
        device = device_of(request.get_extra_info("ssl_object"))
        if not self._trusts(device):
            raise web.HTTPForbidden
        if self._greeting[device] >= MAX_GREETING:
            raise web.HTTPTooManyRequests(headers={"Connection": "close"})
        host = request.remote or "?"
        self._greeting[device] += 1
        try:
            await socket.prepare(request)
            peer = await greet_back(socket, device, self._hello())
        except ConfidantError as failure:
            _log.info("no connection from %s: %s", host, failure)
            return socket
        finally:
            self._greeting[device] -= 1
            self._greeting += Counter()  # drops who greets no longer
        if device == self.identity.device_id:
            await socket.close()
            self._tell_conflict(peer, host)
            return socket
        origin = Origin(device, peer.attempt, peer.instance)
        await self._serve(self._connection(socket, peer, origin, host))
        return socket

    def _connection(self, socket: Socket, peer: Hello, origin: Origin, host: str) -> Connection:
        connection = Connection(
            socket,
            peer,
            origin,
            host,
            requests=self._requests,
            notifications=self._notifications,
            allowance=self._spent.of(peer.device),
        )
        self._connections.admit(connection)
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            if connection.offended:
                self._shunning.offended(connection.peer.device, time.monotonic())
            self._connections.remove(connection)

    def _hello(self) -> Hello:
        self._attempts += 1
        return Hello(
            protocol=PROTOCOL_VERSION,
            device=self.identity.device_id,
            name=self.name,
            instance=self.instance,
            attempt=self._attempts,
            port=self.port,
            addresses=self.addresses[:MAX_ADDRESSES],
            version=confidantd.__version__,
        )

    def _check_self(self, peer: Hello, host: str) -> None:
        if peer.instance != self.instance:
            self._tell_conflict(peer, host)
            raise IdentityConflictError(
                f"the device at {host}:{peer.port} has the identity of this one",
                "give one of the two a home of its own",
            )

    def _tell_conflict(self, peer: Hello, host: str) -> None:
        if peer.instance != self.instance:
            for listener in self._conflicts:
                listener(f"{bracketed(host)}:{peer.port}")

    def _trusts(self, device: DeviceId) -> bool:
        return device == self.identity.device_id or device in self._trust.members()

    def _welcome(self, device: DeviceId) -> bool:
        return self._trusts(device) and not self._shunning.left(device, time.monotonic())

    def _trust_changed_elsewhere(self, _members: frozenset[DeviceId]) -> None:
        """In the thread that changed the trust store."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._trust_changed)

    def _trust_changed(self) -> None:
        self._contexts.forget()
        for device in self.connected():
            if not self._trusts(device):
                for listener in self._untrusted:
                    listener(device)
                self.disconnect(device, "the device is trusted no longer")
        if self._loop is not None and self._acceptor is not None:
            self._loop.call_later(FAREWELL_SECONDS, self._acceptor.drop_unwelcome)

    def _require_address(self, device: DeviceId) -> tuple[str, int]:
        address = self.address(device)
        if address is None:
            raise PeerLostError(f"the device {short_id(device)} is not connected")
        return address

    def _require_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            raise PeerLostError("the network of this device is not running")
        return self._session

    async def _stop(self, runner: web.AppRunner) -> None:
        if self._acceptor is not None:
            await self._acceptor.close()
        self._connections.close_all("this device stops")
        await self._tasks.close()
        if self._session is not None:
            await self._session.close()
        await runner.cleanup()
        if self._acceptor is not None:
            self._acceptor.abort_all()
        for _ in range(LOOP_TURNS_TO_CLOSE):
            await asyncio.sleep(0)


def _is_ours(record: logging.LogRecord) -> bool:
    """Bytes that are no HTTP are the other side's failure: they fill no log."""
    failure = record.exc_info[1] if record.exc_info else None
    return not isinstance(failure, BadHttpMessage)


_http_log.addFilter(_is_ours)
