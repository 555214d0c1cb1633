"""The first messages of a control connection: each side says who it is, and checks the other."""

from __future__ import annotations

import contextlib
import ssl

import aiohttp
from aiohttp import web

from confidantd.errors import ConfidantError, PeerLostError, ProtocolError
from confidantd.ids import DeviceId
from confidantd.net.connection import Socket
from confidantd.net.dialer import CLOSE_SECONDS, CONNECT_SECONDS, translated
from confidantd.net.tls import peer_device_id
from confidantd.wire.messages import Hello, decode_hello, encode, refusal


def device_of(tls: object) -> DeviceId:
    """The proven id of the other side; `tls` is a transport's `ssl_object`."""
    return peer_device_id(tls if isinstance(tls, ssl.SSLObject) else None)


async def greet_first(
    socket: aiohttp.ClientWebSocketResponse, device: DeviceId, own: Hello
) -> Hello:
    """The dialler's part; gives the other side's greeting. The caller bounds the time."""
    await socket.send_bytes(encode(own))
    return _checked(await _receive(socket), device)


async def greet_back(socket: web.WebSocketResponse, device: DeviceId, own: Hello) -> Hello:
    """The listener's part; a greeting that is refused is answered with the reason."""
    async with translated("a device that connected", CONNECT_SECONDS):
        greeting = await _receive(socket)
        await socket.send_bytes(encode(own))  # first: each side must see the other's version
        try:
            return _checked(greeting, device)
        except ConfidantError as failure:
            await _refuse(socket, failure)
            raise


async def _refuse(socket: web.WebSocketResponse, failure: ConfidantError) -> None:
    with contextlib.suppress(PeerLostError):
        async with translated("a refused device", CLOSE_SECONDS):
            await socket.send_bytes(encode(refusal(failure)))
            await socket.close()


async def _receive(socket: Socket) -> bytes:
    message = await socket.receive()
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise PeerLostError("the other device closed the connection before it greeted")
    return bytes(message.data)


def _checked(data: bytes, device: DeviceId) -> Hello:
    hello = decode_hello(data)
    if hello.device != device:
        raise ProtocolError("the greeting names another device than the certificate")
    return hello
