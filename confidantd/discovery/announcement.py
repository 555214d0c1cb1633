"""What a device announces by mDNS, and reading what strangers announce. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId, is_digest
from confidantd.wire.messages import MAX_INSTANCE_CHARACTERS, MAX_NAME_CHARACTERS, clean_name

SERVICE_TYPE = "_confidant._tcp.local."
MAX_ADDRESSES = 8
_MAX_TEXT = 64
_MAX_VALUE_BYTES = 200  # a TXT string has room for 255 with its key


@dataclass(frozen=True, slots=True)
class Announcement:
    """A device that says it is there. Nothing of it is proven before a TLS handshake."""

    device_id: DeviceId
    name: str
    tag: str
    addresses: tuple[str, ...]
    port: int
    version: str
    instance: str
    resources_digest: str = ""
    invitation: str = ""  # `number:port` while a device may join by its code


def to_txt(announcement: Announcement) -> dict[str, str]:
    """The TXT record."""
    name = announcement.name.encode()[:_MAX_VALUE_BYTES].decode(errors="ignore")
    return {
        "id": announcement.device_id,
        "name": name,
        "tag": announcement.tag,
        "v": announcement.version,
        "res": announcement.resources_digest,
        "inst": announcement.instance,
        "inv": announcement.invitation,
    }


def from_txt(
    txt: Mapping[bytes, bytes | None], addresses: Sequence[str], port: int | None
) -> Announcement | None:
    """The announcement in a TXT record, made harmless; None if it is none of ours."""
    keys = ("id", "name", "tag", "v", "res", "inst", "inv")
    fields = {key: _text(txt.get(key.encode())) for key in keys}
    if not is_digest(fields["id"]) or not port or not 0 < port < 65_536 or not fields["inst"]:
        return None
    return Announcement(
        device_id=DeviceId(fields["id"]),
        name=clean_name(fields["name"])[:MAX_NAME_CHARACTERS],
        tag=clean_name(fields["tag"]),
        addresses=tuple(addresses[:MAX_ADDRESSES]),
        port=port,
        version=clean_name(fields["v"]),
        instance=clean_name(fields["inst"])[:MAX_INSTANCE_CHARACTERS],
        resources_digest=clean_name(fields["res"]),
        invitation=clean_name(fields["inv"]),
    )


def _text(value: bytes | None) -> str:
    return (value or b"")[: 4 * _MAX_TEXT].decode("utf-8", errors="replace")
