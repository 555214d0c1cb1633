"""`python -m benchmarks.attackers KIND HOST PORT HOME`: attacks a daemon until it is ended.

`strangers`: 200 at once that connect again and again, with a certificate of their own, with
none, or with bytes that are no TLS. `flood`: a member that sends messages without end.
`stall`: a member that opens 1,000 connections and leaves each in the middle of a frame.
HOME has the identity that attacks; for the last two the daemon trusts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import sys
from pathlib import Path

import aiohttp

import confidantd
from confidantd.errors import ConfidantError
from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    KEY_NAME,
    load_or_create,
)
from confidantd.ids import DeviceId, digest_of
from confidantd.net.dialer import CONTROL_PATH, bracketed, open_socket
from confidantd.net.greeting import device_of, greet_first
from confidantd.net.tls import client_context, pairing_client_context
from confidantd.wire.codec import to_map
from confidantd.wire.messages import PROTOCOL_VERSION, Hello, Notify, Request, encode
from confidantd.wire.roster import Roster, Statement

STRANGERS, STREAMS = 200, 1_000
PAUSE_SECONDS = 0.02  # of one attacker between two attempts
STALLED = 8_000_000  # bytes that a frame promises, of which few come


class Attacker:
    """One device that attacks another one at an address."""

    def __init__(self, host: str, port: int, home: Path) -> None:
        self._host, self._port = host, port
        self._identity = load_or_create(home)

    async def strangers(self) -> None:
        """All at once."""
        with_certificate = pairing_client_context()
        folder = self._identity.home / IDENTITY_FOLDER
        with_certificate.load_cert_chain(folder / CERTIFICATE_NAME, folder / KEY_NAME)
        ways = itertools.cycle((with_certificate, pairing_client_context(), None))
        await asyncio.gather(*(self._knock(next(ways)) for _ in range(STRANGERS)))

    async def flood(self) -> None:
        """Messages of all kinds as fast as they are taken."""
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError, ConfidantError):
                async with aiohttp.ClientSession() as session:
                    await self._send_without_end(session)
            await asyncio.sleep(PAUSE_SECONDS)

    async def stall(self) -> None:
        """Connections that hang."""
        await asyncio.gather(*(self._hang() for _ in range(STREAMS)))

    async def _knock(self, context: ssl.SSLContext | None) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=context)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await reader.read(100)
                writer.close()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _send_without_end(self, session: aiohttp.ClientSession) -> None:
        context = client_context(self._identity.home)
        socket = await open_socket(session, context, self._host, self._port)
        me = self._identity.device_id
        hello = Hello(PROTOCOL_VERSION, me, "mallory", "0" * 16, 1, 9, (), confidantd.__version__)
        await greet_first(socket, device_of(socket.get_extra_info("ssl_object")), hello)
        said = (Statement(me, DeviceId(digest_of(b"x")), 1, signature=b"x" * 70),) * 500
        messages = [
            encode(Notify("swarm.roster", to_map(Roster(said)))),
            encode(Notify("swarm.beat", {"x": "y" * 1000})),
            encode(Request(1, "device.speeds", {"requests": []})),
            encode(Request(2, "job.plan", {})),
            encode(Request(3, "stage.start", {})),
        ]
        for message in itertools.cycle(messages):
            await socket.send_bytes(message)

    async def _hang(self) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                context = client_context(self._identity.home)
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=context)
                host = f"{bracketed(self._host)}:{self._port}"
                writer.write(
                    f"GET {CONTROL_PATH} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
                    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
                )
                await reader.read(1000)
                writer.write(b"\x82\xff" + STALLED.to_bytes(8, "big") + bytes(4) + bytes(100_000))
                await reader.read()  # until it is cut off
                writer.close()
            await asyncio.sleep(1.0)


def main(kind: str, host: str, port: str, home: str) -> None:
    """Attack until SIGTERM."""
    attacker = Attacker(host, int(port), Path(home))
    attacks = {"strangers": attacker.strangers, "flood": attacker.flood, "stall": attacker.stall}
    asyncio.run(attacks[kind]())


if __name__ == "__main__":
    main(*sys.argv[1:])
