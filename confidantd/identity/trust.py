"""The certificates of the paired devices: `HOME/members/<device id>.pem`."""

from __future__ import annotations

import logging
from collections.abc import Callable
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

_log = logging.getLogger(__name__)

MEMBERS_FOLDER = "members"

Listener = Callable[[frozenset[DeviceId]], None]


class TrustStore:
    """Whom this device trusts. Reads and writes files: call it in a thread, not on the loop.

    Listeners get the ids of all members after each change, in the thread that made it.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / MEMBERS_FOLDER
        self._own_path = home / IDENTITY_FOLDER / CERTIFICATE_NAME
        self._members: dict[DeviceId, str] = {}
        self._listeners: list[Listener] = []
        self.reload()

    def members(self) -> dict[DeviceId, str]:
        """Device ids to PEM certificates (this device's own is not among them)."""
        return dict(self._members)

    def on_change(self, listener: Listener) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def forget_listener(self, listener: Listener) -> None:
        """Call `listener` no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def add(self, pem: str) -> DeviceId:
        """Trust the device with this certificate from now on."""
        device = certificate_device_id(pem)
        if device == self._own_id():
            raise DeviceError(
                "this is the certificate of this very device",
                "give the certificate of the other device",
            )
        text = pem.strip() + "\n"
        make_private_folder(self._folder)
        write_private_file(self._folder / f"{device}.pem", text.encode())
        self._replace({**self._members, device: text})
        return device

    def remove(self, device: DeviceId) -> None:
        """Trust the device no longer."""
        try:
            (self._folder / f"{device}.pem").unlink(missing_ok=True)
        except OSError as failure:
            raise StorageError(f"the certificate cannot be removed ({failure.strerror})") from None
        self._replace({k: v for k, v in self._members.items() if k != device})

    def reload(self) -> None:
        """Read the folder again; files that are no member's certificate are left out, and said."""
        found: dict[DeviceId, str] = {}
        own = self._own_id()
        for path in sorted(self._folder.glob("*.pem")):
            try:
                pem = _read_text(path)
                device = certificate_device_id(pem)
            except (ConfidantError, OSError, UnicodeDecodeError) as failure:
                _log.warning("%s is left out: %s", path, failure)
                continue
            if is_digest(path.stem) and path.stem != device:
                _log.warning("%s is left out: it holds the certificate of another device", path)
            elif device != own:
                found[device] = pem
        self._replace(found)

    def _own_id(self) -> DeviceId | None:
        if not self._own_path.exists():
            return None
        return certificate_device_id(_read_text(self._own_path))

    def _replace(self, members: dict[DeviceId, str]) -> None:
        if members == self._members:
            return
        self._members = members
        for listener in self._listeners:
            listener(frozenset(members))


def _read_text(path: Path) -> str:
    with path.open(encoding="ascii") as file:
        return file.read(MAX_CERTIFICATE_CHARACTERS + 1)
