"""The data plane: one mutual-TLS WebSocket to each stage that this one exchanges tensors with.

The lower stage dials the higher one. Frames are sorted into an inbox by
(kind, step, microbatch); a lost link or a wrong frame fails every wait with its cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp import web

from confidantd.errors import ConfidantError, PeerLostError, ProtocolError, StaleEpochError
from confidantd.ids import DeviceId, JobId
from confidantd.net.tls import client_context, peer_device_id, server_context
from confidantd.tasks import TaskSet
from confidantd.wire.frames import Frame, FrameKind, decode_frame, encode_frame
from confidantd.wire.passes import Pass
from confidantd.wire.worker import StageAddress
from confidantd.worker.credits import CONTROLLED, Credits, window
from confidantd.worker.inbox import Inbox

CONNECT_SECONDS = 20.0  # a weak phone needs seconds to load its stage before it dials
CLOSE_SECONDS = 0.3  # for the good-bye of a WebSocket
KEEP_ALIVE_SECONDS = 5.0  # ping; two missed pings end the link
FRAME_OVERHEAD_BYTES = 8_192
MAX_WAITING = 8  # connections of no stage yet: a stage has two neighbours, or three
AT_ONCE_BYTES = 16_384
CHECK_HINT = "check that the other device is on and on the network"
MAX_QUEUED_FRAMES = 64  # outgoing; above every window, so that credits never wait behind it

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class Link:
    """One open WebSocket to one stage; frames go out in the order they were given."""

    def __init__(self, stage: int, socket_: Socket, credits_: Credits) -> None:
        self.stage = stage
        self.credits = credits_
        self._socket = socket_
        self._writing = False
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(MAX_QUEUED_FRAMES)

    async def send(self, message: bytes) -> None:
        """Queue a message; waits when the queue is full (the other side reads too slowly). A short
        one goes out at once where nothing is before it.
        """
        if len(message) > AT_ONCE_BYTES or self._writing or not self._queue.empty():
            await self._queue.put(message)
            return
        try:
            await self._socket.send_bytes(message)
        except OSError:
            raise PeerLostError(f"the link to stage {self.stage} broke", CHECK_HINT) from None

    async def write(self) -> None:
        """Send what is queued, until the link breaks (`OSError`)."""
        while True:
            message = await self._queue.get()
            self._writing = True
            await self._socket.send_bytes(message)
            self._writing = False

    async def read(self, take: Callable[[int, bytes], None]) -> None:
        """Give every incoming message to `take`, until the link ends."""
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                take(self.stage, message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                raise ProtocolError(f"stage {self.stage} sent text on a tensor link")

    async def close(self) -> None:
        """Close the WebSocket; who does not answer is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close()


class Links:
    """The links of one worker: listener, dialling, sending, receiving."""

    def __init__(
        self, home: str, job: JobId, epoch: int, stage: int, stages: int, max_tensor_bytes: int
    ) -> None:
        self._home = home
        self._window = window(stages)
        self._job = job
        self._epoch = epoch
        self._stage = stage
        self._max_message_bytes = max_tensor_bytes + FRAME_OVERHEAD_BYTES
        self._links: dict[int, Link] = {}
        self._expected: dict[int, DeviceId] = {}
        self._arrived = asyncio.Condition()
        self._tasks = TaskSet(f"stage-{stage}.links")
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._closing = False
        self._waiting = 0  # connections that have not shown which stage they are
        # Two neighbours within their windows, and the frames that come once a step.
        self.inbox = Inbox(max_bytes=(2 * self._window + 8) * self._max_message_bytes)

    async def listen(self, hosts: tuple[str, ...]) -> int:
        """Open the listener on a free port of every host; gives the port."""
        app = web.Application()
        app.router.add_get("/v1/stage", self._accept)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        context = await asyncio.to_thread(server_context, self._home)
        port = 0
        for host in hosts:
            listener = socket.create_server((host, port))
            port = listener.getsockname()[1]
            site = web.SockSite(self._runner, listener, ssl_context=context)
            await site.start()
        return port

    async def connect(self, addresses: Mapping[int, StageAddress], partners: set[int]) -> None:
        """Open the link to every partner; `PeerLostError` if one does not come up in time."""
        async with self._arrived:
            self._expected = {stage: addresses[stage].device for stage in partners}
            self._arrived.notify_all()
        self._session = aiohttp.ClientSession()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for stage in sorted(partners):
                    if stage > self._stage:
                        await self._dial(addresses[stage])
                async with self._arrived:
                    await self._arrived.wait_for(lambda: partners <= set(self._links))
        except (TimeoutError, OSError, aiohttp.ClientError) as failure:
            missing = ", ".join(str(stage) for stage in sorted(partners - set(self._links)))
            raise PeerLostError(
                f"stage {self._stage} found no way to stage {missing} ({failure or 'time limit'})",
                "check that no firewall stands between the devices",
            ) from None

    async def send(
        self,
        stage: int,
        kind: FrameKind,
        step: int,
        microbatch: int,
        payload: memoryview | bytes,
        *,
        dtype: str = "float32",
        shape: tuple[int, ...] = (),
        of: Pass | None = None,
    ) -> None:
        """Queue one tensor for another stage; waits while that stage is too far behind."""
        place = (self._job, self._epoch, kind, self._stage, step, microbatch)
        frame = Frame(*place, dtype, shape, of)
        link = self._links.get(stage)
        if link is None:
            raise PeerLostError(f"the link from stage {self._stage} to stage {stage} is gone")
        if kind in CONTROLLED:
            await link.credits.acquire()
        await link.send(encode_frame(frame, payload))

    async def used(self, frame: Frame) -> None:
        """A received frame was taken from the inbox: tell its sender, now or with later ones."""
        link = self._links.get(frame.stage)
        if frame.kind in CONTROLLED and link is not None and link.credits.use():
            credit = Frame(self._job, self._epoch, FrameKind.CREDIT, self._stage, 0, 0)
            await link.send(encode_frame(credit))

    def fail(self, cause: ConfidantError) -> None:
        """End every wait, now and later."""
        for link in self._links.values():
            link.credits.fail(cause)
        self.inbox.fail(cause)

    async def close(self) -> None:
        """Close every link, the listener and their tasks."""
        self._closing = True
        await asyncio.gather(*(link.close() for link in list(self._links.values())))
        await self._tasks.close()
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _dial(self, address: StageAddress) -> None:
        assert self._session is not None
        url = f"wss://{_bracketed(address.host)}:{address.port}/v1/stage"
        context = await asyncio.to_thread(client_context, self._home)
        socket_ = await self._session.ws_connect(
            url,
            ssl=context,
            compress=0,
            heartbeat=KEEP_ALIVE_SECONDS,
            max_msg_size=self._max_message_bytes,
        )
        tls = socket_.get_extra_info("ssl_object")
        if not isinstance(tls, ssl.SSLObject) or peer_device_id(tls) != address.device:
            await socket_.close()
            raise PeerLostError(f"stage {address.stage} answers with another device's certificate")
        await socket_.send_bytes(
            encode_frame(Frame(self._job, self._epoch, FrameKind.HELLO, self._stage, 0, 0))
        )
        await self._adopt(Link(address.stage, socket_, Credits(self._window)))

    async def _accept(self, request: web.Request) -> web.WebSocketResponse:
        socket_ = web.WebSocketResponse(
            compress=False, heartbeat=KEEP_ALIVE_SECONDS, max_msg_size=self._max_message_bytes
        )
        if self._waiting >= MAX_WAITING:
            raise web.HTTPTooManyRequests
        self._waiting += 1
        try:
            await socket_.prepare(request)
            tls = request.get_extra_info("ssl_object")
            frame, _ = decode_frame(await socket_.receive_bytes(timeout=CONNECT_SECONDS))
            self._check(frame)
            await self._admit(frame, peer_device_id(tls))
        except (ConfidantError, TypeError, TimeoutError) as failure:
            await socket_.close(message=str(failure).encode()[:120])
            return socket_
        finally:
            self._waiting -= 1
        link = Link(frame.stage, socket_, Credits(self._window))
        done = await self._adopt(link)
        await asyncio.wait([done])
        return socket_

    async def _admit(self, frame: Frame, device: DeviceId) -> None:
        """Wait for the plan's addresses, which may come after an eager neighbour's call."""
        async with asyncio.timeout(CONNECT_SECONDS):
            async with self._arrived:
                await self._arrived.wait_for(lambda: bool(self._expected))
        if frame.kind is not FrameKind.HELLO or self._expected.get(frame.stage) != device:
            raise ProtocolError("this device does not hold the stage it claims")

    async def _adopt(self, link: Link) -> asyncio.Task[None]:
        task = self._tasks.start(self._serve(link), f"to-{link.stage}")
        async with self._arrived:
            self._links[link.stage] = link
            self._arrived.notify_all()
        return task

    async def _serve(self, link: Link) -> None:
        """Read and write one link; its end fails every wait unless the worker is closing."""
        cause: ConfidantError = PeerLostError(
            f"the link from stage {self._stage} to stage {link.stage} broke",
            CHECK_HINT,
        )
        writer = self._tasks.start(link.write(), f"write-{link.stage}")
        try:
            await link.read(self._take)
        except ConfidantError as failure:
            cause = failure
        finally:
            writer.cancel()
            if not self._closing:
                self._links.pop(link.stage, None)
                link.credits.fail(cause)
                self.inbox.fail(cause)

    def _take(self, stage: int, message: bytes) -> None:
        frame, payload = decode_frame(message)
        self._check(frame)
        if frame.stage != stage:
            raise ProtocolError(f"stage {stage} sent a frame in the name of stage {frame.stage}")
        if frame.kind is FrameKind.CREDIT:
            self._links[stage].credits.release()
        else:
            self.inbox.put(frame, payload)

    def _check(self, frame: Frame) -> None:
        if frame.job != self._job or frame.epoch != self._epoch:
            raise StaleEpochError(f"a frame of epoch {frame.epoch} reached epoch {self._epoch}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
