"""The messages of a pairing over a TLS stream, bounded in size; foreign errors become ours."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import TypeVar

from confidantd.errors import PeerLostError, ProtocolError
from confidantd.wire.pairing import (
    LENGTH,
    MAX_PAIRING_BYTES,
    Card,
    Knock,
    Share,
    decode_pairing,
    encode_pairing,
)

_T = TypeVar("_T", Knock, Share, Card)


class PairingStream:
    """One connection between a joiner and an inviter."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS session."""
        found = self._writer.get_extra_info("ssl_object")
        return found if isinstance(found, ssl.SSLObject) else None

    async def send(self, message: Knock | Share | Card) -> None:
        """Send one message."""
        await self.send_bytes(encode_pairing(message))

    async def send_bytes(self, data: bytes) -> None:
        """Send a message that is encoded already."""
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, kind: type[_T]) -> _T:
        """The next message; raises what the other side refused us with, or `ProtocolError`."""
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if length > MAX_PAIRING_BYTES:
            raise ProtocolError(f"a pairing message of {length} bytes is over the limit")
        message = decode_pairing(await self._reader.readexactly(length))
        if not isinstance(message, kind):
            raise ProtocolError("a pairing message out of order")
        return message

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def translated(where: str, timeout_seconds: float) -> AsyncIterator[None]:
    """Bound what happens inside in time and turn network errors into ours."""
    try:
        async with asyncio.timeout(timeout_seconds):
            yield
    except TimeoutError:
        raise PeerLostError(f"{where} did not answer within {timeout_seconds:g} s") from None
    except ConnectionRefusedError:
        raise PeerLostError(
            f"no invitation is open at {where}", "ask for a new code: confidant invite"
        ) from None
    except ssl.SSLError:
        raise PeerLostError(
            f"what answers at {where} takes no invitations",
            "give the address that the inviter shows; its port is another one than the daemon's",
        ) from None
    except (OSError, asyncio.IncompleteReadError) as failure:
        reason = getattr(failure, "strerror", None) or type(failure).__name__
        raise PeerLostError(
            f"the connection to {where} broke ({reason})",
            "check the address, and that the invitation is still open",
        ) from None
