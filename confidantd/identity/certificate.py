"""The identity of this device: a key, a self-signed certificate, and the id that follows."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from confidantd.errors import IdentityError, NotPairedError
from confidantd.identity.files import check_private, make_private_folder
from confidantd.ids import DeviceId, digest_of

IDENTITY_FOLDER = "identity"
KEY_NAME = "key.pem"
CERTIFICATE_NAME = "certificate.pem"
MAX_CERTIFICATE_CHARACTERS = 8_192  # ours have about 700

_CREATE_SECONDS = 60.0  # importing `cryptography` takes seconds on a weak board


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
        _create(folder)
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


def _create(folder: Path) -> None:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, no input of others
            [sys.executable, "-m", "confidantd.identity", str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CREATE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise IdentityError(f"no identity could be made ({failure})", _CREATE_HINT) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise IdentityError(f"no identity could be made ({lines[-1][:200]})", _CREATE_HINT)


_CREATE_HINT = "check that the package `cryptography` is installed and the home can be written"
