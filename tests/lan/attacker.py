"""`python -m tests.lan.attacker ATTACK HOST PORT [ARGUMENT...]`: one attack, from its own host.

It has the source code. Prints one JSON object: what the attack got.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

import confidantd
from confidantd.errors import ConfidantError, PeerLostError
from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    KEY_NAME,
    load_or_create,
)
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, JobId
from confidantd.net.dialer import CONTROL_PATH, open_socket
from confidantd.net.greeting import device_of, greet_first
from confidantd.net.tls import client_context, pairing_client_context
from confidantd.swarm.joining import join
from confidantd.swarm.pairing import Code
from confidantd.wire.frames import Frame, FrameKind, encode_frame
from confidantd.wire.messages import PROTOCOL_VERSION, Hello, Refused, Request, decode, encode
from confidantd.wire.pairing import Card

SECONDS = 10.0
HELLO = b"GET " + CONTROL_PATH.encode() + (
    b" HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)  # fmt: skip
Address = tuple[str, int]


async def plain(address: Address) -> dict[str, Any]:
    """HTTP and a WebSocket without TLS."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(HELLO)
    return await _heard(reader, writer)


async def no_certificate(address: Address) -> dict[str, Any]:
    """A WebSocket over TLS, showing no certificate."""
    return await _over_tls(address, pairing_client_context())


async def own_certificate(address: Address, home: str) -> dict[str, Any]:
    """With a certificate made by the same code."""
    context, folder = pairing_client_context(), load_or_create(Path(home)).home / IDENTITY_FOLDER
    context.load_cert_chain(folder / CERTIFICATE_NAME, folder / KEY_NAME)
    return await _over_tls(address, context)


async def old_tls(address: Address) -> dict[str, Any]:
    """TLS 1.2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return await _over_tls(address, context)


async def replay(address: Address, recorded: str) -> dict[str, Any]:
    """The bytes that a member once sent to this port."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(Path(recorded).read_bytes())  # noqa: ASYNC240 - nothing else runs here
    return await _heard(reader, writer)


async def guess(address: Address, home: str, number: str, count: str) -> dict[str, Any]:
    """Join with codes that are not the one that is shown."""
    identity = load_or_create(Path(home))
    card, said = Card(identity.certificate_pem, "mallory", 1), []
    for secret in range(int(count)):
        try:
            await join(TrustStore(identity.home), Code(number, f"{secret:06d}"), *address, card)
        except ConfidantError as failure:
            said.append(failure.code)
    return {"tries": said, "members": list(TrustStore(identity.home).members())}


async def speak_as(address: Address, home: str, device: str) -> dict[str, Any]:
    """A member says that it is another device."""
    try:
        async with aiohttp.ClientSession() as session:
            await _greeted(session, address, Path(home), DeviceId(device))
    except ConfidantError as failure:
        return {"refused": failure.message}
    return {"refused": ""}


async def command(address: Address, home: str, job: str, *methods: str) -> dict[str, Any]:
    """A member commands stages of another's job, and offers plans though it coordinates none."""
    answers = {}
    async with aiohttp.ClientSession() as session:
        me = load_or_create(Path(home)).device_id
        link = await _greeted(session, address, Path(home), me)
        for number, method in enumerate(methods, 1):
            fields = {"job": job, "epoch": 1, "stage": 0, "term": 10**6}
            await link.send_bytes(encode(Request(number, method, fields)))
            while True:
                found = decode((await link.receive(SECONDS)).data)
                if getattr(found, "id", None) == number:
                    answers[method] = getattr(found, "code", "answered")
                    break
    return answers


async def frame(address: Address, home: str, job: str, epoch: str) -> dict[str, Any]:
    """A member that holds no stage speaks to a worker, as stage 0 of an epoch."""
    context = client_context(Path(home))
    url = f"wss://{address[0]}:{address[1]}/v1/stage"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, ssl=context) as link:
        hello = Frame(JobId(job), int(epoch), FrameKind.HELLO, 0, 0, 0)
        await link.send_bytes(encode_frame(hello))
        wrong = Frame(JobId(job), int(epoch), FrameKind.ACTIVATION, 0, 1, 0, "float32", (1,))
        await link.send_bytes(encode_frame(wrong, bytes(4)))
        found = await link.receive(SECONDS)
        return {"closed": found.type is not aiohttp.WSMsgType.BINARY, "why": str(found.extra)}


async def _greeted(
    session: aiohttp.ClientSession, address: Address, home: Path, device: DeviceId
) -> aiohttp.ClientWebSocketResponse:
    link = await open_socket(session, client_context(home), *address)
    release = confidantd.__version__
    hello = Hello(PROTOCOL_VERSION, device, "mallory", "0" * 16, 1, 9, (), release)
    await greet_first(link, device_of(link.get_extra_info("ssl_object")), hello)
    first = decode((await link.receive(SECONDS)).data)
    if isinstance(first, Refused):
        raise PeerLostError(first.message)
    return link


async def _over_tls(address: Address, context: ssl.SSLContext) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(*address, ssl=context)
    writer.write(HELLO)
    return await _heard(reader, writer)


async def _heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
    data = await reader.read(10_000)
    writer.close()
    return {"heard": data.decode("latin-1"), "refused": ""}


ATTACKS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    f.__name__: f
    for f in (
        plain, no_certificate, own_certificate, old_tls, replay, guess,
        speak_as, command, frame,
    )
}  # fmt: skip


async def main(attack: str, host: str, port: str, *arguments: str) -> None:
    """Print what it got."""
    _, writer = await asyncio.open_connection(host, int(port))  # else nothing was attacked
    writer.close()
    try:
        async with asyncio.timeout(SECONDS):
            found = await ATTACKS[attack]((host, int(port)), *arguments)
    except (OSError, aiohttp.ClientError, TimeoutError) as failure:
        found = {"heard": "", "refused": repr(failure)}
    print(json.dumps(found))


def capture(interface: str, file: str) -> None:
    """Every packet of an interface into a file, each after its length, until SIGTERM."""
    every = socket.ntohs(0x0003)
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every) as tap,
        Path(file).open("wb") as out,
    ):
        tap.bind((interface, 0))
        print("ready", flush=True)
        while True:
            packet = tap.recv(70_000)
            out.write(len(packet).to_bytes(4, "big") + packet)
            out.flush()


if __name__ == "__main__":
    if sys.argv[1] == "capture":
        capture(*sys.argv[2:])
    else:
        asyncio.run(main(*sys.argv[1:]))
