"""The inviter's side of pairing: a listener of its own that is open only while an invitation is.

Its TLS shows this device's certificate and asks for none; whoever connects proves the code.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from confidantd.errors import ConfidantError, NotPairedError, WrongCodeError
from confidantd.identity.certificate import Identity
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.net.listen import open_any
from confidantd.net.tls import pairing_server_context
from confidantd.swarm.pairing import (
    INVITATION_SECONDS,
    Code,
    Exchange,
    Invitation,
    new_code,
)
from confidantd.swarm.pairing_stream import PairingStream, translated
from confidantd.tasks import TaskSet
from confidantd.wire.messages import clean_name
from confidantd.wire.pairing import Card, Knock, Share, refusal

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0  # a weak board needs a second for the exchange
HANDSHAKE_SECONDS = 5.0
MAX_CONNECTIONS, MAX_FROM_HOST = 64, 8  # one stranger does not keep others out


@dataclass(frozen=True, slots=True)
class Joined:
    """Who used an invitation."""

    device: DeviceId
    name: str
    host: str
    port: int


class Inviting:
    """At most one invitation at a time. `me` gives this device's card without a proof."""

    def __init__(
        self,
        identity: Identity,
        trust: TrustStore,
        hosts: Sequence[str],
        me: Callable[[], Card],
        changed: Callable[[], None],
        joined: Callable[[Joined], None],
    ) -> None:
        self.invitation: Invitation | None = None
        self.last: Joined | None = None
        self.port = 0
        self._identity, self._trust, self._hosts = identity, trust, tuple(hosts)
        self._me, self._changed, self._joined = me, changed, joined
        self._servers: list[asyncio.Server] = []
        self._connections: Counter[str] = Counter()
        self._used: Code | None = None  # by a device that is being added
        self._tasks = TaskSet("inviting")

    @property
    def announced(self) -> str:
        """`number:port` of the open invitation, for mDNS; empty without one."""
        invitation = self.invitation
        return f"{invitation.code.number}:{self.port}" if invitation and invitation.open else ""

    async def invite(self) -> Invitation:
        """Open a new invitation; an older one is withdrawn."""
        await self.withdraw()
        context = await asyncio.to_thread(pairing_server_context, self._identity.home)
        listeners = await asyncio.to_thread(open_any, self._hosts)
        self.port = int(listeners[0].getsockname()[1])
        self.last = None
        self.invitation = Invitation(self._other_code(), self._now() + INVITATION_SECONDS)
        for listener in listeners:
            accept = functools.partial(self._accept, context)
            self._servers.append(await asyncio.start_server(accept, sock=listener))
        self._tasks.start(self._expire(self.invitation), "expiry")
        self._changed()
        return self.invitation

    def _other_code(self) -> Code:
        """A new one with another number than the last: by it one sees which invitation it is."""
        last = self.invitation
        while True:
            code = new_code()
            if last is None or code.number != last.code.number:
                return code

    async def withdraw(self) -> None:
        """Close the open invitation, if there is one."""
        if self.invitation is not None and self.invitation.open:
            self.invitation = self.invitation.ended("withdrawn")
        await self._close_listeners()

    async def close(self) -> None:
        """This device stops."""
        await self.withdraw()
        await self._tasks.close()

    async def _close_listeners(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if servers:
            self._changed()

    async def _expire(self, invitation: Invitation) -> None:
        await asyncio.sleep(invitation.expires - self._now())
        if self.invitation is not None and self.invitation.code is invitation.code:
            self.invitation = self.invitation.at(self._now())
            await self._close_listeners()

    def _accept(
        self, context: ssl.SSLContext, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Counted before the handshake, which a stranger may never end."""
        host = str((writer.get_extra_info("peername") or ("?",))[0])
        full = self._connections.total() >= MAX_CONNECTIONS
        if full or self._connections[host] >= MAX_FROM_HOST:
            writer.close()
            return
        self._connections[host] += 1
        self._tasks.start(self._serve(context, reader, writer, host), "joiner")

    async def _serve(
        self,
        context: ssl.SSLContext,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
    ) -> None:
        stream = PairingStream(reader, writer)
        try:
            async with translated("a device that joins", ANSWER_SECONDS):
                await writer.start_tls(context, ssl_handshake_timeout=HANDSHAKE_SECONDS)
                try:
                    await self._pair(stream, host)
                except ConfidantError as failure:
                    await stream.send_bytes(refusal(failure))
                    raise
        except ConfidantError as failure:
            _log.info("no pairing with %s: %s", host, failure)
        finally:
            self._connections[host] -= 1
            self._connections += Counter()  # drops hosts without one
            await stream.close()
            if self.invitation is None or not self.invitation.open:
                await self._close_listeners()

    async def _pair(self, stream: PairingStream, host: str) -> None:
        knock = await stream.receive(Knock)
        invitation = self._require_open(knock.number)
        exchange = await asyncio.to_thread(
            Exchange, "inviter", invitation.code.secret, self._identity.device_id
        )
        await asyncio.to_thread(exchange.meet, knock.share)
        await stream.send(Share(exchange.share))
        card = await stream.receive(Card)
        invitation = self._require_open(knock.number)
        try:
            exchange.check("joiner", card)
        except WrongCodeError:
            self.invitation = invitation.guessed_wrong()
            raise
        self._used = invitation.code  # before anything else can use it
        try:
            device, gone = await asyncio.to_thread(self._trust.invited, card.certificate, card.left)
        except ConfidantError:
            self._used = None
            raise
        self.last = Joined(device, clean_name(card.name), host, card.port)
        if self.invitation is not None and self.invitation.code is invitation.code:
            self.invitation = self.invitation.ended("joined")  # with a device to show
        self._joined(self.last)
        await stream.send(exchange.signed("inviter", replace(self._me(), gone=gone)))

    def _require_open(self, number: str) -> Invitation:
        invitation = self.invitation.at(self._now()) if self.invitation else None
        wanted = invitation is not None and invitation.open and invitation.code is not self._used
        if invitation is None or not wanted or invitation.code.number != number:
            raise NotPairedError(
                "no invitation with this code is open there", "ask for a new code: confidant invite"
            )
        return invitation

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
