"""Makes the key and the self-signed certificate. Loads `cryptography`.

Runs in a short-lived process of its own (`python -m confidantd.identity create FOLDER`), so
that the library's memory never stays in the daemon.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from confidantd.identity.files import make_private_folder, write_private_file

YEARS_VALID = 20
COMMON_NAME = "confidant"

# Trust is by the certificate itself, so its dates only must never stand in the way: a board
# without a clock battery may believe in 1970, when it makes its identity or when it checks one.
_NOT_BEFORE = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EARLIEST_NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def create_identity(folder: Path, key_name: str, certificate_name: str) -> None:
    """Write a fresh P-256 key and its certificate into `folder`; the certificate comes last."""
    key_pem, certificate_pem = _make()
    make_private_folder(folder)
    write_private_file(folder / key_name, key_pem)
    write_private_file(folder / certificate_name, certificate_pem)


def _make() -> tuple[bytes, bytes]:
    from cryptography import x509  # noqa: PLC0415 - see the head of the file
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, COMMON_NAME)])
    now = max(dt.datetime.now(dt.UTC), _EARLIEST_NOW)
    # All certificates carry one name: the key identifiers tell OpenSSL which root is meant.
    subject_key = x509.SubjectKeyIdentifier.from_public_key(public)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(now + dt.timedelta(days=365 * YEARS_VALID))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(subject_key, critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)
