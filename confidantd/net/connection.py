"""One control connection: requests with answers, and notifications, over one WebSocket.

An object is one connection and is used once. Its end is decided synchronously (`close`),
so it cannot be cancelled half-way; the first reason given is the one reported.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from aiohttp import web

from confidantd.errors import ConfidantError, PeerLostError, ProtocolError, from_wire
from confidantd.ids import DeviceId, short_id
from confidantd.net.allowance import Allowance
from confidantd.net.duplicates import Origin
from confidantd.net.silence import Silence
from confidantd.tasks import TaskSet
from confidantd.wire.messages import (
    Failure,
    Hello,
    Message,
    Notify,
    Refused,
    Request,
    Response,
    Retire,
    decode,
    encode,
)

_log = logging.getLogger(__name__)

RequestHandler = Callable[[DeviceId, dict[str, Any]], Awaitable[dict[str, Any]]]
NotifyHandler = Callable[[DeviceId, dict[str, Any]], None]
Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse

MAX_QUEUED_BYTES = 24 * 1024 * 1024  # three of the largest messages
MAX_QUEUED_MESSAGES = 1_024
MAX_RUNNING_HANDLERS = 128
# Of the processor, besides what is measured: TLS and WebSocket, of a message and of each byte.
MESSAGE_SECONDS, BYTE_SECONDS = 1e-4, 1.2e-8
MOST_PAUSE_SECONDS = 0.5  # between two messages: a heartbeat may wait behind them
RETIRE_SECONDS = 10.0  # for answers still under way when a duplicate is given up
CLOSE_SECONDS = 2.0
ABRUPT_SECONDS = 0.05  # after nonsense: what else comes is thrown away, but has to be decrypted
MAX_REASON_BYTES = 120  # a WebSocket close frame has room for 123


class Connection:
    """A greeted connection to `peer`. `host` is where it was reached or came from. `allowance`
    are the seconds of this device's processor that the peer's messages may take.
    """

    def __init__(
        self,
        socket: Socket,
        peer: Hello,
        origin: Origin,
        host: str,
        *,
        requests: Mapping[str, RequestHandler],
        notifications: Mapping[str, NotifyHandler],
        allowance: Allowance,
    ) -> None:
        self.peer = peer
        self.origin = origin
        self.host = host
        self.reason = ""
        self.offended = False  # it ended because the peer broke the rules
        self._socket = socket
        self._requests = requests
        self._notifications = notifications
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = self._running_handlers = 0
        self._silence = Silence()
        self._retiring = self._peer_retired = False
        self._allowance = allowance
        self._close_seconds = CLOSE_SECONDS
        self._handlers = TaskSet(f"answer-{self._name()}")
        self._tasks = TaskSet(f"connection-{self._name()}")

    @property
    def open(self) -> bool:
        """False once its end is decided."""
        return not self._ended.is_set()

    async def run(self) -> None:
        """Serve the connection until it ends; `reason` then says why."""
        try:
            self._tasks.start(self._read(), "read")
            self._tasks.start(self._write(), "write")
            await self._ended.wait()
        finally:
            self.close("this device stops")
            await self._tasks.close()
            await self._close_socket()
            await self._handlers.close()

    def close(self, reason: str) -> None:
        """End the connection; every request that waits for an answer fails with `reason`."""
        if self._ended.is_set():
            return
        self.reason = reason
        self._ended.set()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(PeerLostError(f"{self._label()} is gone: {reason}"))
        self._pending.clear()

    def retire(self) -> None:
        """Another connection of this pair is kept: finish what is under way here, then close."""
        if not self._retiring and self.open:
            self._send(Retire())
            self._retiring = True
            self._tasks.start(self._retire_late(), "retire")
            self._retire_if_idle()

    async def request(
        self, method: str, params: dict[str, Any], timeout_seconds: float
    ) -> dict[str, Any]:
        """The peer's answer; raises the error it sent, or `PeerLostError`."""
        if not self.open:
            raise PeerLostError(f"{self._label()} is gone: {self.reason}")
        self._next_id += 1
        number = self._next_id
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._send(Request(number, method, params))
            async with asyncio.timeout(timeout_seconds):
                return await future
        except TimeoutError:
            raise PeerLostError(
                f"{self._label()} did not answer {method} within {timeout_seconds:g} s"
            ) from None
        finally:
            self._pending.pop(number, None)
            self._retire_if_idle()

    def notify(self, topic: str, params: dict[str, Any]) -> bool:
        """Queue a notification; False if the connection has ended."""
        self._send(Notify(topic, params))
        return self.open

    def _send(self, message: Message) -> None:
        """Queue a message. A peer that reads too slowly loses the connection here."""
        if not self.open:
            return
        data = encode(message)
        full = self._queued_bytes + len(data) > MAX_QUEUED_BYTES
        if self._queue and (full or len(self._queue) >= MAX_QUEUED_MESSAGES):
            self.close("it reads too slowly")
            return
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                await self._flush()
                self._wake.clear()
                self._retire_if_idle()
        except (OSError, aiohttp.ClientError) as failure:
            self.close(f"the connection broke ({type(failure).__name__})")

    async def _flush(self) -> None:
        while self._queue:
            data = self._queue.popleft()  # first: a send that is cancelled has written its frame
            self._queued_bytes -= len(data)
            await self._socket.send_bytes(data)
            if self._silence.on(self._socket.get_extra_info("socket")):
                self._close_seconds = ABRUPT_SECONDS
                self.close("it is out of reach")

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                if message.type is aiohttp.WSMsgType.ERROR:
                    break
                if message.type is not aiohttp.WSMsgType.BINARY:
                    raise ProtocolError("it sent text instead of a message")
                await self._pace(message.data)
            self.close(_close_reason(self._socket))
        except ConfidantError as failure:
            self.offended = isinstance(failure, ProtocolError)
            self._close_seconds = ABRUPT_SECONDS
            self.close(failure.message)
        except (OSError, aiohttp.ClientError) as failure:
            self.close(f"the connection broke ({type(failure).__name__})")
        finally:
            self.close("this device failed inside")

    async def _pace(self, data: bytes) -> None:
        """Take a message. A peer whose messages cost too much is read slowly then: its network
        holds the rest back.
        """
        began = time.thread_time()
        try:
            self._take(decode(data))
        finally:
            spent = time.thread_time() - began + MESSAGE_SECONDS + BYTE_SECONDS * len(data)
            wait = self._allowance.spend(spent, asyncio.get_running_loop().time())
        if wait > 0:
            await asyncio.sleep(min(wait, MOST_PAUSE_SECONDS))

    def _take(self, message: Message) -> None:
        match message:
            case Request():
                self._start_handler(message)
            case Response(number, result):
                self._settle(number, lambda future: future.set_result(result))
            case Failure(number, code, text, hint):
                failure = from_wire({"code": code, "message": text, "hint": hint})
                self._settle(number, lambda future: future.set_exception(failure))
            case Notify(topic, params):
                self._notified(topic, params)
            case Retire():
                self._peer_retired = True
                self._retire_if_idle()
            case Refused(code, text, hint):
                raise from_wire({"code": code, "message": text, "hint": hint})
            case Hello():
                raise ProtocolError("it greeted twice")

    def _settle(
        self, number: int, settle: Callable[[asyncio.Future[dict[str, Any]]], None]
    ) -> None:
        future = self._pending.pop(number, None)
        if future is not None and not future.done():
            settle(future)

    def _notified(self, topic: str, params: dict[str, Any]) -> None:
        handler = self._notifications.get(topic)
        if handler is None:
            _log.debug("%s: nothing listens to %.64r", self._label(), topic)
            return
        handler(self.peer.device, params)

    def _start_handler(self, request: Request) -> None:
        handler = self._requests.get(request.method)
        if handler is None:
            failure = ProtocolError(f"nothing answers {request.method[:64]!r} here")
            self._send(Failure(request.id, **failure.to_wire()))
        elif self._running_handlers >= MAX_RUNNING_HANDLERS:
            raise ProtocolError("it asks too much at once")
        else:
            self._running_handlers += 1
            self._handlers.start(self._answer(handler, request), request.method)

    async def _answer(self, handler: RequestHandler, request: Request) -> None:
        failure = ConfidantError("the other device failed inside", "see its log")
        answer: Message = Failure(request.id, **failure.to_wire())
        try:
            answer = Response(request.id, await handler(self.peer.device, request.params))
        except ConfidantError as expected:
            answer = Failure(request.id, **expected.to_wire())
        finally:
            self._running_handlers -= 1
            self._send(answer)

    def _retire_if_idle(self) -> None:
        busy = self._pending or self._queue or self._running_handlers
        if self._retiring and self._peer_retired and not busy:
            self.close("another connection is kept")

    async def _retire_late(self) -> None:
        await asyncio.sleep(RETIRE_SECONDS)
        self.close("another connection is kept")

    async def _close_socket(self) -> None:
        reason = self.reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
        try:
            async with asyncio.timeout(self._close_seconds):
                await self._flush()
                await self._socket.close(message=reason)
        except (TimeoutError, OSError, aiohttp.ClientError) as failure:
            _log.debug("%s: not closed in order: %r", self._label(), failure)

    def _name(self) -> str:
        return short_id(self.peer.device)

    def _label(self) -> str:
        return self.peer.name or self._name()


def _close_reason(socket: Socket) -> str:
    code = socket.close_code
    if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
        return "a message was over the size limit"
    if code in (aiohttp.WSCloseCode.OK, aiohttp.WSCloseCode.GOING_AWAY):
        return "it closed the connection"
    return "the connection broke"
