"""Who belongs to a swarm, as members tell each other: signed statements."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId, Digest, digest_of
from confidantd.wire.codec import pack, to_map

# Of one author, and of all: a swarm of 45 devices in which everybody let in everybody has 2,000.
MAX_OF_AUTHOR, MAX_STATEMENTS = 128, 2_048
MAX_CERTIFICATE_CHARACTERS = 2_000  # ours have about 700
MAX_SIGNATURE_BYTES = 80  # ECDSA over P-256 in DER has at most 72
MAX_CHANGE = 2**31
MAX_ROSTER_BYTES = 4 * 1024 * 1024  # of all statements together; half of a message
_STATEMENT_BYTES, _KEPT_BYTES = 400, 70  # about, without the certificate
_PURPOSE = "confidant roster 1"  # what is signed for another purpose is no statement


@dataclass(frozen=True, slots=True)
class Statement:
    """What one member says of another device: that it belongs to the swarm, with its certificate
    (PEM), or, without one, that it does no longer.

    `change` counts the times that `device` came and went: it belongs to the swarm while it
    was let in by a higher change than it was removed by. `keeps`, of a removal: ids of those
    statements of the removed device itself that stay right. `signature` is the author's,
    over `signed_bytes`; empty while it has told nobody.
    """

    author: DeviceId
    device: DeviceId
    change: int
    certificate: str = ""
    keeps: tuple[Digest, ...] = ()
    signature: bytes = b""

    @property
    def admits(self) -> bool:
        """Whether it lets the device in."""
        return bool(self.certificate)

    @property
    def leaves(self) -> bool:
        """Whether the device says that it goes itself."""
        return self.author == self.device

    @property
    def id(self) -> Digest:
        """Of what is said, without the signature."""
        return digest_of(signed_bytes(self))

    @property
    def size(self) -> int:
        """Bytes that it takes in a message, about."""
        return _STATEMENT_BYTES + len(self.certificate) + _KEPT_BYTES * len(self.keeps)


def signed_bytes(statement: Statement) -> bytes:
    """What the author signs."""
    fields = to_map(statement)
    del fields["signature"]
    return pack({"purpose": _PURPOSE, **fields})


@dataclass(frozen=True, slots=True)
class Roster:
    """All that one member knows, in the order in which it learned it."""

    statements: tuple[Statement, ...]

    @property
    def size(self) -> int:
        """Bytes, about."""
        return sum(statement.size for statement in self.statements)
