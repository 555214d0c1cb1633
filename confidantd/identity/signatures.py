"""Signs with this device's key and checks signatures of others. Loads `cryptography`.

Runs in a short-lived process of its own, as making an identity does; see `signing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from confidantd.identity.signing import Claim


def sign_all(key_path: Path, texts: Iterable[bytes]) -> list[bytes]:
    """An ECDSA signature (SHA-256, DER) of each text."""
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return [key.sign(text, ec.ECDSA(hashes.SHA256())) for text in texts]


def check_all(claims: Iterable[Claim]) -> list[bool]:
    """Whether each signature is that of its text by the key of its certificate."""
    return [_right(claim) for claim in claims]


def _right(claim: Claim) -> bool:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    try:
        key = x509.load_pem_x509_certificate(claim.certificate.encode()).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(claim.signature, claim.text, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True
