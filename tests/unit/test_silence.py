"""When a connection's other side counts as silent."""

from __future__ import annotations

import socket
import struct

import pytest

from confidantd.net.silence import LEAST_SECONDS, MOST_SECONDS, TCP_INFO, Silence


def info(rto: float = 0.2, retransmits: int = 0, unacked: int = 1, ack_came: float = 0.0) -> bytes:
    """The begin of `struct tcp_info`; seconds."""
    times = (round(rto * 1e6), 0, 0, 0, unacked, 0, 0, 0, 0, 0, 0, 0, round(ack_came * 1e3))
    return struct.pack("=8B13I", 1, 0, retransmits, 0, 0, 0, 0, 0, *times)


@pytest.mark.parametrize(
    ("rto", "patience"), [(0.2, LEAST_SECONDS), (0.6, 3.0), (5.0, MOST_SECONDS)]
)
def test_a_poor_network_is_given_more_time(rto: float, patience: float) -> None:
    silence = Silence()
    assert not silence.falls(info(rto, ack_came=patience - 0.1))
    assert silence.falls(info(rto, ack_came=patience + 0.1))


def test_what_is_overdue_is_not_given_more() -> None:
    """The kernel doubles its timeout each time it sends something again."""
    assert Silence().falls(info(6.4, retransmits=5, ack_came=LEAST_SECONDS + 0.1))


def test_where_nothing_is_on_its_way_nobody_is_silent() -> None:
    assert not Silence().falls(info(unacked=0, ack_came=3600.0))


@pytest.mark.skipif(TCP_INFO is None, reason="this system does not tell")
def test_a_program_that_does_not_read_is_slow_and_not_gone() -> None:
    silence = Silence()
    assert not silence.on(None)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        client.setblocking(False)
        sent = 0
        try:
            while True:
                sent += client.send(bytes(65536))
        except BlockingIOError:
            pass
        assert sent > 65536
        assert not silence.on(client)
    assert not silence.on(client), "closed"
