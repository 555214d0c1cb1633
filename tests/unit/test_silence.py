"""When a connection's other side counts as silent."""

from __future__ import annotations

import socket
import struct

import pytest

from confidantd.net.silence import (
    LEAST_SECONDS,
    MOST_SECONDS,
    TCP_USER_TIMEOUT,
    notice_silence,
    patience_seconds,
)


def info(rto_seconds: float, retransmits: int = 0) -> bytes:
    """The begin of `struct tcp_info`."""
    return struct.pack("=8BI", 1, 0, retransmits, 0, 0, 0, 0, 0, round(rto_seconds * 1e6))


@pytest.mark.parametrize(
    ("rto", "expected"),
    [(0.2, LEAST_SECONDS), (0.6, pytest.approx(4.2)), (5.0, MOST_SECONDS)],
)
def test_a_poor_network_is_given_more_time(rto: float, expected: float) -> None:
    assert patience_seconds(info(rto)) == expected


def test_what_is_overdue_is_not_given_more() -> None:
    assert patience_seconds(info(1.6, retransmits=3)) is None


@pytest.mark.skipif(TCP_USER_TIMEOUT is None, reason="this system has no such limit")
def test_a_real_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            notice_silence(client)
            assert TCP_USER_TIMEOUT is not None
            found = client.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT)
            assert 1000 * LEAST_SECONDS <= found <= 1000 * MOST_SECONDS
        notice_silence(client)  # closed: nothing happens
        notice_silence(None)
