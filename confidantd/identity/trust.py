"""Whom this device trusts: the statements of members that count, in `HOME/members.json`.

One file, replaced as a whole: what is in memory is never ahead of the disk, and a crash leaves the
list as it was before or after a change.
"""

from __future__ import annotations

import base64
import json
import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError, DeviceError, IdentityError, ProtocolError
from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    KEY_NAME,
    MAX_CERTIFICATE_CHARACTERS,
    certificate_device_id,
)
from confidantd.identity.files import make_private_folder, write_private_file
from confidantd.identity.ledger import Ledger
from confidantd.identity.signing import Claim, check, sign
from confidantd.ids import DeviceId
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.roster import MAX_CHANGE, MAX_SIGNATURE_BYTES, Statement, signed_bytes

_log = logging.getLogger(__name__)

MEMBERS_NAME = "members.json"
FORMAT = 1

Listener = Callable[[frozenset[DeviceId]], None]


class TrustStore:
    """Whom this device trusts. Reads and writes files: call it in a thread, not on the loop.

    Listeners get the ids of all members after each change, in the thread that made it.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / MEMBERS_NAME
        identity = home / IDENTITY_FOLDER
        self._own = _own_certificate(identity / CERTIFICATE_NAME)
        self._key_path = identity / KEY_NAME
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()
        self._ledger = self._read()
        self._members = self._ledger.members
        self._told = frozenset(self._members)

    def members(self) -> dict[DeviceId, str]:
        """Device ids to PEM certificates (this device's own is not among them)."""
        return dict(self._members)

    def introducers(self, device: DeviceId) -> set[DeviceId]:
        """Which members let a device in."""
        return self._ledger.introducers(device)

    def depending_on(self, device: DeviceId) -> set[DeviceId]:
        """Members that nobody but this device vouches for, or those it vouches for."""
        return self._ledger.depending_on(device)

    @property
    def gone(self) -> int:
        """By which change this device left a swarm last; whoever lets it in has to know."""
        return self._ledger.gone

    def statements(self) -> tuple[Statement, ...]:
        """What members are told. Neither waits nor reads a file."""
        return tuple(s for s in self._ledger.statements if s.signature)

    def is_news(self, statements: Iterable[Statement]) -> bool:
        """Whether there is a statement among them that does not count here."""
        return any(not self._ledger.knows(s.id) for s in statements)

    def removal_of(self, device: DeviceId) -> tuple[Statement, ...]:
        """Those by which a device was removed."""
        said = self.statements()
        return tuple(s for s in said if s.device == device and not s.admits)

    def on_change(self, listener: Listener) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def forget_listener(self, listener: Listener) -> None:
        """Call `listener` no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def add(self, pem: str) -> DeviceId:
        """Trust the device with this certificate from now on, also if it was removed before."""
        return self.invited(pem, 0)[0]

    def invited(self, pem: str, gone: int) -> tuple[DeviceId, int]:
        """Let a device in that left a swarm by the change `gone`, as it says; gives by which it
        was out, for it to know that it is in again.
        """
        device, text = self._other(pem)
        with self._lock:
            ledger = self._ledger.copy()
            gone = ledger.admit(device, text, gone)
            self._keep(ledger)
        self._tell()
        return device, gone

    def joined(self, pem: str, gone: int, left: int, *, merge: bool) -> DeviceId:
        """The device with this certificate let this one in, which was out by the change `gone`. It
        left a swarm itself by the change `left`: what old members tell of that is over.
        Unless two swarms are merged, what this one said before, in another swarm or after it
        was removed, is nothing to the one that it joins.
        """
        device, text = self._other(pem)
        with self._lock:
            before = self._ledger
            said = before.statements if merge else ()
            ledger = Ledger(before.me, max(before.gone, min(gone, MAX_CHANGE - 1)), said)
            ledger.admit(device, text, left)
            self._keep(ledger)
        self._tell()
        return device

    def _other(self, pem: str) -> tuple[DeviceId, str]:
        device, text = _canonical(pem)
        if device == self._ledger.me:
            raise DeviceError(
                "this is the certificate of this very device",
                "give the certificate of the other device",
            )
        return device, text

    def remove(self, device: DeviceId) -> None:
        """Trust the device no longer, whoever still does. It stands on the disk before anything
        else; listeners hear of it once it is signed, so that the device can be told.
        """
        with self._lock:
            ledger = self._ledger.copy()
            ledger.remove(device)
            self._keep(ledger)
        try:
            self.sign()
        except ConfidantError as failure:
            _log.warning("members are told later of a removal: %s", failure)
        self._tell()

    def sign(self) -> None:
        """Sign what this device has said, so that it can be told."""
        said = self._ledger.statements
        signed = self._signed([s for s in said if s.author == self._ledger.me and not s.signature])
        if signed:
            with self._lock:
                ledger = self._ledger.copy()
                ledger.put_signatures(signed)
                self._keep(ledger)

    def farewell(self) -> tuple[Statement, ...]:
        """What members are told when this device leaves the swarm."""
        return self._signed([self._ledger.farewell()])

    def merge(self, statements: Iterable[Statement]) -> bool:
        """Take what another member knows and this one does not; whether it was anything.

        `ProtocolError` if a signature is wrong. A device that hears that it was removed
        itself trusts nobody any more.
        """
        checked = self._checked(self._ledger, statements)
        with self._lock:
            ledger = self._ledger.copy()
            if not ledger.take(checked):
                return False
            if ledger.removed_me:
                ledger = Ledger(ledger.me, ledger.gone_now)
            self._keep(ledger)
        self._tell()
        return True

    def leave(self) -> None:
        """Trust nobody any more: this device is on its own."""
        with self._lock:
            self._keep(Ledger(self._ledger.me, self._ledger.gone_now))
        self._tell()

    def _checked(self, ledger: Ledger, statements: Iterable[Statement]) -> list[Statement]:
        """Those that are new and by whom they say; by whom cannot be told are left out."""
        found = [s for s in statements if not ledger.knows(s.id)]
        certificates = self._certificates(found)
        claims, claimed = [], []
        for statement in found:
            author = statement.author
            pem = self._own if author == ledger.me else ledger.certificate(author)
            pem = pem or certificates.get(author)
            if pem is not None:
                claims.append(Claim(pem, signed_bytes(statement), statement.signature))
                claimed.append(statement)
        if any(len(s.signature) > MAX_SIGNATURE_BYTES for s in claimed) or not all(check(claims)):
            raise ProtocolError("its list of members has a wrong signature")
        return claimed

    def _certificates(self, statements: Sequence[Statement]) -> dict[DeviceId, str]:
        """What statements bring with them; `ProtocolError` if one is of another device."""
        found: dict[DeviceId, str] = {}
        for statement in statements:
            if not statement.admits or found.get(statement.device) == statement.certificate:
                continue
            try:
                right = _canonical(statement.certificate)
            except ConfidantError:
                right = None
            if right != (statement.device, statement.certificate):
                raise ProtocolError("its list of members has a wrong certificate")
            found[statement.device] = statement.certificate
        return found

    def _signed(self, statements: Sequence[Statement]) -> tuple[Statement, ...]:
        signatures = sign(self._key_path, [signed_bytes(s) for s in statements])
        return tuple(
            replace(s, signature=signature)
            for s, signature in zip(statements, signatures, strict=True)
        )

    def _keep(self, ledger: Ledger) -> None:
        """On the disk first."""
        fields = {
            "format": FORMAT,
            "gone": ledger.gone,
            "statements": [_to_json(statement) for statement in ledger.statements],
        }
        make_private_folder(self._home)
        write_private_file(self._path, json.dumps(fields, indent=1).encode())
        self._ledger, self._members = ledger, ledger.members

    def _tell(self) -> None:
        """Once for each other list of members."""
        with self._lock:
            members = frozenset(self._members)
            news, self._told = members != self._told, members
        for listener in self._listeners if news else ():
            listener(members)

    def _read(self) -> Ledger:
        """`IdentityError` for a damaged file: a removal must not be forgotten."""
        me = certificate_device_id(self._own)
        try:
            found = json.loads(self._path.read_bytes())
            if found["format"] != FORMAT or not isinstance(found["gone"], int):
                raise ValueError
            statements = [_from_json(fields) for fields in found["statements"]]
            return Ledger(me, found["gone"], statements)
        except FileNotFoundError:
            return Ledger(me)
        except (OSError, ValueError, KeyError, TypeError, ConfidantError) as failure:
            raise IdentityError(
                f"the list of members {self._path} cannot be read ({type(failure).__name__})",
                "restore the file, or delete it and pair this device again",
            ) from None


def _canonical(pem: str) -> tuple[DeviceId, str]:
    """The id of a certificate, and the one way to write it down: what OpenSSL reads is what was
    checked.
    """
    device = certificate_device_id(pem)
    return device, ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem.strip()))


def _own_certificate(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            return file.read(MAX_CERTIFICATE_CHARACTERS + 1)
    except (OSError, ValueError) as failure:
        raise IdentityError(f"there is no identity in {path.parent} ({failure})") from None


def _to_json(statement: Statement) -> dict[str, Any]:
    signature = base64.b64encode(statement.signature).decode()
    return {**to_map(statement), "signature": signature}


def _from_json(fields: dict[str, Any]) -> Statement:
    signature = base64.b64decode(fields["signature"], validate=True)
    return from_map(Statement, {**fields, "signature": signature})
