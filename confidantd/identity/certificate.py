"""The identity of this device: a key, a self-signed certificate, and the id that follows."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from confidantd.errors import IdentityError, NotPairedError
from confidantd.identity.files import check_private, make_private_folder
from confidantd.identity.signing import run_tool
from confidantd.ids import DeviceId, digest_of

IDENTITY_FOLDER = "identity"
KEY_NAME = "key.pem"
CERTIFICATE_NAME = "certificate.pem"
MAX_CERTIFICATE_CHARACTERS = 8_192  # ours have about 700


@dataclass(frozen=True, slots=True)
class Identity:
    """`device_id` is the SHA-256 of the certificate; the key never leaves its file."""

    home: Path
    device_id: DeviceId
    certificate_pem: str
    key_path: Path
    certificate_path: Path


def load_or_create(home: Path) -> Identity:
    """The identity in `home`, made at the first start. Blocks for a second then.

    `IdentityError` if the key is readable by others or does not fit the certificate.
    """
    make_private_folder(home)
    folder = home / IDENTITY_FOLDER
    key, certificate = folder / KEY_NAME, folder / CERTIFICATE_NAME
    if not certificate.exists():
        run_tool("create", [str(folder)])
    check_files(key, certificate)
    pem = certificate.read_text(encoding="ascii")
    return Identity(home, certificate_device_id(pem), pem, key, certificate)


def check_files(key: Path, certificate: Path) -> None:
    """`IdentityError` unless both files are there, private, and belong together."""
    try:
        check_private(key)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as failure:  # ssl.SSLError is one too
        raise IdentityError(
            f"the identity in {key.parent} cannot be used ({failure.strerror or failure})",
            f"restore the folder, or delete {key.parent} to start with a new identity",
        ) from None


def certificate_device_id(pem: str) -> DeviceId:
    """The device id of exactly one PEM certificate; `NotPairedError` if it is none."""
    text = pem.strip()
    if len(text) > MAX_CERTIFICATE_CHARACTERS or text.count("BEGIN CERTIFICATE") != 1:
        raise NotPairedError("this is not one certificate in PEM form", _EXPORT_HINT)
    try:
        der = ssl.PEM_cert_to_DER_cert(text)
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=der)
    except (ValueError, ssl.SSLError):
        raise NotPairedError("this certificate is damaged", _EXPORT_HINT) from None
    return DeviceId(digest_of(der))


_EXPORT_HINT = "export it again on the other device and copy the whole file"
