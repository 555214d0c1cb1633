"""Connections to devices that are gone end soon, to those that are slow they do not.

The kernel of a device acknowledges what it gets however busy its programs are. Where it does
not, the device is off, asleep or out of reach. How long that may take is a multiple of what
our kernel itself found a sensible time to wait on this connection (RFC 6298), so that a poor
network is given more. On Linux, and so on Android; elsewhere heartbeats tell, a little later.
"""

from __future__ import annotations

import socket
import struct

LEAST_SECONDS, MOST_SECONDS = 1.1, 10.0
TIMEOUTS = 5.0  # a healthy Wi-Fi's is 0.2 s
TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
# The begin of struct tcp_info in linux/tcp.h: times are microseconds but for the last ones, which
# are milliseconds. Eight bytes, then rto, ato, mss of both, unacked (segments), sacked, lost,
# retrans, fackets, and how long ago data was sent, an ack was sent, data came, an ack came.
_INFO = struct.Struct("=8B13I")
_RETRANSMITS, _RTO, _UNACKED, _ACK_CAME = 2, 8, 12, 20


class Silence:
    """Whether the other side of one connection has fallen silent."""

    def __init__(self) -> None:
        self._patience = LEAST_SECONDS

    def falls(self, tcp_info: bytes) -> bool:
        """Whether what was sent has been acknowledged by nobody for too long. A program that does
        not read is no silence: what does not fit into its window was not sent.
        """
        found = _INFO.unpack_from(tcp_info)
        if not found[_RETRANSMITS]:
            self._patience = min(max(TIMEOUTS * 1e-6 * found[_RTO], LEAST_SECONDS), MOST_SECONDS)
        return bool(found[_UNACKED]) and found[_ACK_CAME] > 1000 * self._patience

    def on(self, connection: socket.socket | None) -> bool:
        """The same of a socket; False where the system does not tell."""
        if connection is None or TCP_INFO is None:
            return False
        try:
            return self.falls(connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, _INFO.size))
        except (OSError, struct.error):
            return False
