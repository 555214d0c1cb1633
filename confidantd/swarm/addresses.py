"""Where members may be reached: remembered, announced, gossiped and proven addresses. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from confidantd.errors import ConfigError
from confidantd.ids import DeviceId, is_digest
from confidantd.wire.messages import clean_name

MAX_ADDRESSES_PER_DEVICE = 8
MAX_HOST_CHARACTERS = 253


def parse_address(text: str) -> tuple[str, int] | None:
    """`host:port` or `[IPv6]:port`; None if it is neither."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not colon or not host or len(host) > MAX_HOST_CHARACTERS or not host.isascii():
        return None
    if any(c.isspace() or c in "/@?#" for c in host) or not (port.isascii() and port.isdigit()):
        return None
    return (host, int(port)) if len(port) <= 5 and 0 < int(port) < 65_536 else None


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def typed_address(text: str) -> tuple[str, int]:
    """The address a person typed; `ConfigError` if it is none."""
    address = parse_address(text)
    if address is None:
        raise ConfigError(f"{text[:80]!r} is not an address", "write HOST:PORT")
    return address


def is_ip_address(host: str) -> bool:
    """False for names: what strangers announce must not make us ask a name server."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class AddressBook:
    """Addresses and the last known name per device, the most promising address first."""

    def __init__(self) -> None:
        self._addresses: dict[DeviceId, list[str]] = {}
        self._names: dict[DeviceId, str] = {}

    def get(self, device: DeviceId) -> tuple[str, ...]:
        """Addresses to try, in this order."""
        return tuple(self._addresses.get(device, ()))

    def name(self, device: DeviceId) -> str:
        """What the device last called itself, or an empty text."""
        return self._names.get(device, "")

    def set_name(self, device: DeviceId, name: str) -> None:
        """Remember what the device calls itself."""
        self._names[device] = clean_name(name)

    def put_first(self, device: DeviceId, addresses: Iterable[str]) -> bool:
        """Announced or proven addresses; True if one of them is new."""
        fresh = [text for text in dict.fromkeys(addresses) if parse_address(text)]
        known = self._addresses.get(device, [])
        merged = [*fresh, *(text for text in known if text not in fresh)]
        self._addresses[device] = merged[:MAX_ADDRESSES_PER_DEVICE]
        return not set(fresh) <= set(known)

    def put_last(self, device: DeviceId, addresses: Iterable[str]) -> bool:
        """Addresses heard of; True if one of them is new and there was room for it."""
        known = self._addresses.setdefault(device, [])
        before = len(known)
        for text in addresses:
            if text not in known and parse_address(text) and len(known) < MAX_ADDRESSES_PER_DEVICE:
                known.append(text)
        return len(known) > before

    def update(self, other: AddressBook) -> None:
        """Take over what another book holds, after what is here already."""
        for device, addresses in other._addresses.items():
            self.put_last(device, addresses)
        for device, name in other._names.items():
            self._names.setdefault(device, name)

    def drop(self, device: DeviceId, address: str) -> None:
        """Somebody else answers at this address."""
        if address in self._addresses.get(device, []):
            self._addresses[device].remove(address)

    def to_json(self, devices: Iterable[DeviceId]) -> dict[str, Any]:
        """What to remember of some devices."""
        return {
            device: {"name": self.name(device), "addresses": list(self.get(device))}
            for device in devices
        }

    @classmethod
    def from_json(cls, fields: Any) -> AddressBook:
        """What was remembered; entries that make no sense are left out."""
        book = cls()
        for device, entry in fields.items() if isinstance(fields, Mapping) else ():
            if not is_digest(str(device)) or not isinstance(entry, Mapping):
                continue
            addresses = entry.get("addresses")
            if isinstance(addresses, list):
                book.put_last(DeviceId(device), list(map(str, addresses)))
            book.set_name(DeviceId(device), str(entry.get("name") or ""))
        return book
