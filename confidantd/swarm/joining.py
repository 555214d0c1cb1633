"""The joiner's side of pairing: connect, prove the code, and take the inviter's certificate."""

from __future__ import annotations

import asyncio

import confidantd
from confidantd.errors import NotPairedError, PeerLostError
from confidantd.identity.certificate import certificate_device_id
from confidantd.identity.trust import TrustStore
from confidantd.net.dialer import bracketed
from confidantd.net.tls import pairing_client_context, peer_device_id
from confidantd.swarm.inviting import Joined
from confidantd.swarm.pairing import Code, Exchange
from confidantd.swarm.pairing_stream import PairingStream, translated
from confidantd.wire.messages import PROTOCOL_VERSION, clean_name
from confidantd.wire.pairing import Card, Knock, Share

JOIN_SECONDS = 20.0


async def join(
    trust: TrustStore, code: Code, host: str, port: int, me: Card, *, merge: bool = False
) -> Joined:
    """Pair with the inviter at an address; `me` is this device's card without a proof. `merge`:
    with all that this device said in its own swarm.

    `WrongCodeError` if either side finds the other not to know the code; `NotPairedError`,
    `PeerLostError` or `ProtocolError` for what else can go wrong. Nothing is trusted then.
    """
    where = f"{bracketed(host)}:{port}"
    async with translated(where, JOIN_SECONDS):
        reader, writer = await asyncio.open_connection(host, port, ssl=pairing_client_context())
    stream = PairingStream(reader, writer)
    try:
        async with translated(where, JOIN_SECONDS):
            exchange = await _meet(stream, code)
        try:
            async with translated(where, JOIN_SECONDS):
                card = await _prove(stream, exchange, me)
        except PeerLostError:
            # Whoever has our proof can compare one guess with it, and must not get a second one:
            # not an error after which another address is tried.
            raise NotPairedError(
                "the other device went away after it had this one's proof of the code",
                "ask for a new code: confidant invite",
            ) from None
    finally:
        await stream.close()
    device = await asyncio.to_thread(
        trust.joined, card.certificate, card.gone, card.left, merge=merge
    )
    return Joined(device, clean_name(card.name), host, card.port)


async def _meet(stream: PairingStream, code: Code) -> Exchange:
    """Both halves of the key exchange."""
    inviter = peer_device_id(stream.tls)
    exchange = await asyncio.to_thread(Exchange, "joiner", code.secret, inviter)
    release = confidantd.__version__
    await stream.send(Knock(PROTOCOL_VERSION, release, code.number, exchange.share))
    share = await stream.receive(Share)
    await asyncio.to_thread(exchange.meet, share.share)
    return exchange


async def _prove(stream: PairingStream, exchange: Exchange, me: Card) -> Card:
    """The inviter's card, which it has proven, for ours."""
    await stream.send(exchange.signed("joiner", me))
    card = await stream.receive(Card)
    exchange.check("inviter", card)
    if certificate_device_id(card.certificate) != peer_device_id(stream.tls):
        raise NotPairedError("the inviter shows two certificates")
    return card
