"""One attempt to reach a device: foreign exceptions become ours here, and only here."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import aiohttp

from confidantd.errors import ConfidantError, NotPairedError, PeerLostError, PeerRefusedError
from confidantd.errors import ProtocolError as WireProtocolError
from confidantd.wire.codec import MAX_MESSAGE_BYTES

CONTROL_PATH = "/v1/control"
CONNECT_SECONDS = 5.0
PING_SECONDS = 20.0  # keeps NAT and Wi-Fi associations alive; liveness is the swarm's heartbeat
CLOSE_SECONDS = 1.0
FORBIDDEN, TOO_MANY = 403, 429  # HTTP; a device makes one attempt at a time

_PAIR_HINT = "pair the two devices: confidant invite on one, confidant join CODE on the other"


def bracketed(host: str) -> str:
    """A host as it stands in an URL."""
    return f"[{host}]" if ":" in host else host


async def open_socket(
    session: aiohttp.ClientSession, context: ssl.SSLContext, host: str, port: int
) -> aiohttp.ClientWebSocketResponse:
    """The control WebSocket of the daemon at an address; a `ConfidantError` says why not."""
    return await session.ws_connect(
        f"wss://{bracketed(host)}:{port}{CONTROL_PATH}",
        ssl=context,
        compress=0,
        heartbeat=PING_SECONDS,
        max_msg_size=MAX_MESSAGE_BYTES,
        timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
    )


@contextlib.asynccontextmanager
async def translated(where: str, timeout_seconds: float) -> AsyncIterator[None]:
    """Bound what happens inside in time and turn its network errors into ours."""
    try:
        async with asyncio.timeout(timeout_seconds):
            yield
    except TimeoutError:
        raise PeerLostError(f"{where} did not answer within {timeout_seconds:g} s") from None
    except (aiohttp.ClientError, OSError) as failure:
        raise _ours(where, failure) from None


def _ours(where: str, failure: Exception) -> ConfidantError:
    cause = getattr(failure, "os_error", None) or failure.__cause__ or failure
    if isinstance(cause, ConnectionRefusedError):
        return PeerRefusedError(f"nothing listens at {where}", "start confidantd there")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return NotPairedError(f"the device at {where} is not paired with this one", _PAIR_HINT)
    if isinstance(cause, ssl.SSLError):
        return _tls_failed(where, cause)
    if isinstance(failure, aiohttp.WSServerHandshakeError):
        return _refused(where, failure.status)
    # A TLS 1.3 server rejects a client only after the client's handshake is complete.
    return PeerLostError(
        f"the connection to {where} broke ({type(failure).__name__})",
        "check that both devices are paired and on the network",
    )


def _tls_failed(where: str, failure: ssl.SSLError) -> ConfidantError:
    """An alert is a refusal of our certificate; all else was no TLS of ours."""
    if "ALERT" in (failure.reason or ""):
        return NotPairedError(f"the device at {where} does not know this one", _PAIR_HINT)
    return WireProtocolError(f"what answers at {where} is no confidantd")


def _refused(where: str, status: int) -> ConfidantError:
    if status == FORBIDDEN:
        return NotPairedError(f"the device at {where} does not know this one", _PAIR_HINT)
    if status == TOO_MANY:
        return PeerLostError(f"the device at {where} is being connected to already")
    return WireProtocolError(f"what answers at {where} is no confidantd")
