"""Whom this device trusts: `HOME/members/<device id>.pem`, and how often each was added and
removed, in `HOME/members/changes.json`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from confidantd.errors import ConfidantError, DeviceError, StorageError
from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    MAX_CERTIFICATE_CHARACTERS,
    certificate_device_id,
)
from confidantd.identity.files import make_private_folder, write_private_file
from confidantd.ids import DeviceId, is_digest
from confidantd.wire.roster import MAX_CHANGE, MAX_ENTRIES, RosterEntry

_log = logging.getLogger(__name__)

MEMBERS_FOLDER = "members"
CHANGES_NAME = "changes.json"

Listener = Callable[[frozenset[DeviceId]], None]


class TrustStore:
    """Whom this device trusts. Reads and writes files: call it in a thread, not on the loop.

    Listeners get the ids of all members after each change, in the thread that made it.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / MEMBERS_FOLDER
        self._own_path = home / IDENTITY_FOLDER / CERTIFICATE_NAME
        self._members: dict[DeviceId, str] = {}
        self._changes: dict[DeviceId, int] = {}
        self._own: dict[DeviceId, str] = {}
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()
        self.reload()

    def members(self) -> dict[DeviceId, str]:
        """Device ids to PEM certificates (this device's own is not among them)."""
        return dict(self._members)

    def entries(self) -> tuple[RosterEntry, ...]:
        """Every device that is or was a member, as members tell each other; also this one, once
        it heard of itself. Neither waits nor reads a file.
        """
        certificates = {**self._members, **self._own}
        return tuple(
            RosterEntry(device, change, certificates.get(device, "") if change % 2 else "")
            for device, change in sorted(dict(self._changes).items())
        )

    def on_change(self, listener: Listener) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def forget_listener(self, listener: Listener) -> None:
        """Call `listener` no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def add(self, pem: str) -> DeviceId:
        """Trust the device with this certificate from now on, also if it was removed before."""
        device = certificate_device_id(pem)
        if device == self._own_id():
            raise DeviceError(
                "this is the certificate of this very device",
                "give the certificate of the other device",
            )
        with self._lock:
            before = self._changes.get(device, 0)
            self._keep(RosterEntry(device, before + 1 + before % 2, pem))
        return device

    def remove(self, device: DeviceId) -> None:
        """Trust the device no longer, whoever still does."""
        with self._lock:
            before = self._changes.get(device, 0)
            self._keep(RosterEntry(device, before + 2 - before % 2))

    def merge(self, entries: Iterable[RosterEntry]) -> bool:
        """Take what another member knows and this one does not; whether it was anything.

        What is no device's certificate is left out. A device that hears that it was removed
        itself trusts nobody any more.
        """
        with self._lock:
            own, news = self._own_id(), False
            for entry in entries:
                if not self._newer(entry):
                    continue
                if entry.device != own:
                    self._keep(entry)
                else:
                    self._changes[entry.device] = entry.change
                    self._write_changes()
                    if not entry.member:
                        self.leave()
                news = True
            return news

    def leave(self) -> None:
        """Trust nobody any more: this device is on its own."""
        with self._lock:
            own = self._own_id()
            for device in list(self._members):
                self._unlink(device)
            self._changes = {d: change for d, change in self._changes.items() if d == own}
            self._write_changes()
            self._replace({})

    def reload(self) -> None:
        """Read the folder again; files that are no member's certificate are left out, and said."""
        with self._lock:
            self._changes = self._read_changes()
            found: dict[DeviceId, str] = {}
            own = self._own_id()
            for path in sorted(self._folder.glob("*.pem")):
                pem = self._read_member(path)
                device = certificate_device_id(pem) if pem else None
                if pem is None or device is None or device == own:
                    continue
                if self._changes.setdefault(device, 1) % 2:
                    found[device] = pem
            self._replace(found)

    def _read_member(self, path: Path) -> str | None:
        try:
            pem = _read_text(path)
            device = certificate_device_id(pem)
        except (ConfidantError, OSError, UnicodeDecodeError) as failure:
            _log.warning("%s is left out: %s", path, failure)
            return None
        if is_digest(path.stem) and path.stem != device:
            _log.warning("%s is left out: it holds the certificate of another device", path)
            return None
        return pem

    def _newer(self, entry: RosterEntry) -> bool:
        """Whether it can be, and this device does not know it yet."""
        if not is_digest(entry.device) or not 0 < entry.change < MAX_CHANGE:
            return False
        known = self._changes.get(entry.device)
        if known is None and len(self._changes) >= MAX_ENTRIES:
            _log.warning("a swarm has at most %d devices: one more is left out", MAX_ENTRIES)
            return False
        if known is not None and entry.change <= known:
            return False
        try:
            return not entry.member or certificate_device_id(entry.certificate) == entry.device
        except ConfidantError:
            return False

    def _keep(self, entry: RosterEntry) -> None:
        """Files first. A certificate is written before its number, and goes after it: what a crash
        leaves in between is never a member that was removed.
        """
        device = entry.device
        if entry.member:
            text = entry.certificate.strip() + "\n"
            make_private_folder(self._folder)
            write_private_file(self._folder / f"{device}.pem", text.encode())
            self._changes[device] = entry.change
            self._write_changes()
            self._replace({**self._members, device: text})
            return
        self._changes[device] = entry.change
        self._write_changes()
        self._unlink(device)
        self._replace({k: v for k, v in self._members.items() if k != device})

    def _unlink(self, device: DeviceId) -> None:
        try:
            (self._folder / f"{device}.pem").unlink(missing_ok=True)
        except OSError as failure:
            raise StorageError(f"the certificate cannot be removed ({failure.strerror})") from None

    def _read_changes(self) -> dict[DeviceId, int]:
        path = self._folder / CHANGES_NAME
        try:
            found = json.loads(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as failure:
            _log.warning("%s is left out: %s", path, failure)
            return {}
        if not isinstance(found, dict):
            return {}
        return {
            DeviceId(device): change
            for device, change in found.items()
            if is_digest(device) and isinstance(change, int) and 0 < change < MAX_CHANGE
        }

    def _write_changes(self) -> None:
        make_private_folder(self._folder)
        data = json.dumps(self._changes, sort_keys=True).encode()
        write_private_file(self._folder / CHANGES_NAME, data)

    def _own_id(self) -> DeviceId | None:
        """None before this device has an identity."""
        if not self._own and self._own_path.exists():
            pem = _read_text(self._own_path)
            self._own = {certificate_device_id(pem): pem}
        return next(iter(self._own), None)

    def _replace(self, members: dict[DeviceId, str]) -> None:
        if members == self._members:
            return
        self._members = members
        for listener in self._listeners:
            listener(frozenset(members))


def _read_text(path: Path) -> str:
    with path.open(encoding="ascii") as file:
        return file.read(MAX_CERTIFICATE_CHARACTERS + 1)
