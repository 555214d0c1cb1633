"""What two devices say to each other while they pair by a code, and its bytes.

    joiner   Knock   its half of the key exchange
    inviter  Share   the other half
    joiner   Card    who it is, with a proof that it knows the code
    inviter  Card    who it is, with its own proof; or `Refused` at any time

Each message is four bytes of length and a msgpack map with a `"type"`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from confidantd.errors import ConfidantError, ProtocolError, from_wire
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.messages import PROTOCOL_VERSION, Refused, version_mismatch

MAX_PAIRING_BYTES = 16 * 1024
LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Knock:
    """`number` says which invitation the code belongs to; `share` is a SPAKE2 message."""

    protocol: int
    release: str
    number: str
    share: bytes


@dataclass(frozen=True, slots=True)
class Share:
    """The inviter's SPAKE2 message."""

    share: bytes


@dataclass(frozen=True, slots=True)
class Card:
    """Who a device is. `left`: by which change it left a swarm last; of an inviter also `gone`: by
    which one the joiner was out before it was let in now (`wire.roster`). `proof` is a MAC of the
    rest under the key of the exchange.
    """

    certificate: str
    name: str
    port: int
    left: int = 0
    gone: int = 0
    proof: bytes = b""


PairingMessage = Knock | Share | Card | Refused
_TYPES: dict[str, type[PairingMessage]] = {
    "knock": Knock,
    "share": Share,
    "card": Card,
    "refused": Refused,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}


def encode_pairing(message: PairingMessage) -> bytes:
    """The bytes of one message, with its length in front."""
    body = pack({"type": _NAMES[type(message)], **to_map(message)})
    return LENGTH.pack(len(body)) + body


def decode_pairing(body: bytes) -> Knock | Share | Card:
    """The message in `body`. Raises what the other side refused us with, or `ProtocolError`.

    The protocol version is compared before anything else of a `Knock` is read.
    """
    fields = unpack(body, max_bytes=MAX_PAIRING_BYTES)
    kind = str(fields.pop("type", ""))
    if kind == "refused":
        raise from_wire(fields)
    if kind == "knock" and fields.get("protocol") != PROTOCOL_VERSION:
        raise version_mismatch(fields.get("protocol"), fields.get("release"))
    cls = _TYPES.get(kind)
    if cls is None:
        raise ProtocolError("a pairing message of unknown type")
    message = from_map(cls, fields)
    assert not isinstance(message, Refused)
    return message


def refusal(failure: ConfidantError) -> bytes:
    """The message that ends a pairing with an error."""
    return encode_pairing(Refused(**failure.to_wire()))
