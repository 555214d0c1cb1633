"""TLS between paired devices: version 1.3 only, both sides prove a certificate that is trusted.

The trust roots are the self-signed certificates of the members and this device's own
(so that a copied home shows itself). Names and dates in certificates mean nothing: after
the handshake both sides compare the peer's device id with the one they expect.
"""

from __future__ import annotations

import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Iterable
from pathlib import Path

from confidantd.errors import NotPairedError
from confidantd.identity.certificate import CERTIFICATE_NAME, IDENTITY_FOLDER, KEY_NAME
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, digest_of

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a board without a clock battery must reach its peers,
# and a pinned certificate gains nothing from its dates.
_NO_CHECK_TIME = 0x20_0000

# asyncio sets aside 256 KiB of each TLS connection for what comes in, also where nothing ever does,
# and frees it late: a quarter of it reads as fast from a network.
_BUFFER_BYTES = 64 * 1024
SSLProtocol.max_size = min(SSLProtocol.max_size, _BUFFER_BYTES)


def server_context(home: str | Path, roots: Iterable[str] | None = None) -> ssl.SSLContext:
    """For listening. `roots`: PEM certificates to trust; by default all members and ourselves.

    Reads files. Sessions are never resumed, so a removed member cannot skip the check.
    """
    context = _context(_AlertingContext(ssl.PROTOCOL_TLS_SERVER), Path(home), roots)
    context.num_tickets = 0
    return context


def client_context(home: str | Path, roots: Iterable[str] | None = None) -> ssl.SSLContext:
    """For dialling; the arguments are those of `server_context`."""
    return _context(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), Path(home), roots)


def pairing_server_context(home: str | Path) -> ssl.SSLContext:
    """For pairing: shows this device's certificate and asks for none. Reads files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    identity = Path(home) / IDENTITY_FOLDER
    context.load_cert_chain(identity / CERTIFICATE_NAME, identity / KEY_NAME)
    return context


def pairing_client_context() -> ssl.SSLContext:
    """For pairing: takes any certificate, which the proof of the code is bound to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_device_id(tls: ssl.SSLObject | ssl.SSLSocket | None) -> DeviceId:
    """The device id of the other side of a connection after its handshake."""
    der = tls.getpeercert(binary_form=True) if tls is not None else None
    if not der:
        raise NotPairedError("the other side showed no certificate")
    return DeviceId(digest_of(der))


def trusted_roots(home: Path, trust: TrustStore) -> list[str]:
    """PEM certificates of all members and of this device."""
    return [*trust.members().values(), own_certificate(home)]


def own_certificate(home: Path) -> str:
    """This device's certificate (PEM)."""
    return (home / IDENTITY_FOLDER / CERTIFICATE_NAME).read_text(encoding="ascii")


def unsent_alert(failure: BaseException) -> bytes:
    """The TLS alert of a failed handshake, which asyncio forgets to send: without it the
    other side sees a broken connection and cannot know that it is not trusted."""
    return getattr(failure, _ALERT_ATTRIBUTE, b"")


_ALERT_ATTRIBUTE = "confidant_alert"


class _AlertingObject(ssl.SSLObject):
    """Keeps the alert with the error."""

    outgoing: ssl.MemoryBIO

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as failure:
            setattr(failure, _ALERT_ATTRIBUTE, self.outgoing.read())
            raise


class _AlertingContext(ssl.SSLContext):
    sslobject_class = _AlertingObject

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        assert isinstance(made, _AlertingObject)
        made.outgoing = outgoing
        return made


def _context(context: ssl.SSLContext, home: Path, roots: Iterable[str] | None) -> ssl.SSLContext:
    if roots is None:
        roots = trusted_roots(home, TrustStore(home))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    context.options |= ssl.OP_NO_TICKET
    identity = home / IDENTITY_FOLDER
    context.load_cert_chain(identity / CERTIFICATE_NAME, identity / KEY_NAME)
    context.load_verify_locations(cadata="\n".join(roots))
    return context
