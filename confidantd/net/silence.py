"""Connections to devices that are gone end soon, to those that are slow they do not.

The kernel of a device acknowledges what it gets however busy its programs are. Where it does
not, the device is off, asleep or out of reach. How long that may take is a multiple of what
the kernel itself found a sensible time to wait on this connection (RFC 6298), so that a poor
network is given more.
"""

from __future__ import annotations

import contextlib
import socket
import struct

LEAST_SECONDS, MOST_SECONDS = 1.4, 10.0
TIMEOUTS = 7.0  # a healthy Wi-Fi's is 0.2 s
TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
_INFO = struct.Struct("=8BI")  # the begin of struct tcp_info in linux/tcp.h
_RETRANSMITS, _RTO = 2, 8


def patience_seconds(tcp_info: bytes) -> float | None:
    """How long to wait for a sign of the other kernel; None while it is overdue already."""
    found = _INFO.unpack_from(tcp_info)
    if found[_RETRANSMITS]:
        return None
    return min(max(TIMEOUTS * 1e-6 * float(found[_RTO]), LEAST_SECONDS), MOST_SECONDS)


def notice_silence(connection: socket.socket | None) -> None:
    """Let a connection break when the other kernel is silent for too long; to be called again
    as the network changes. Does nothing where the system cannot do that.
    """
    if connection is None or TCP_USER_TIMEOUT is None or TCP_INFO is None:
        return
    with contextlib.suppress(OSError):
        info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, _INFO.size)
        seconds = patience_seconds(info)
        if seconds is not None:
            connection.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, round(1000 * seconds))
