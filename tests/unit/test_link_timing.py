"""Bandwidth from bytes and their times: bursts, slow links, transfers side by side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.ids import DeviceId
from confidantd.net.link_probe import MAX_LINK_BYTES
from confidantd.net.link_timing import MOST_SECONDS, LinkTiming, TransferTiming

A, B = DeviceId("a" * 64), DeviceId("b" * 64)
BURST = 256 * 1024
PIECE = 16 * 1024
MB = 1_000_000


def probe(mbps: float, burst_bytes: int = BURST) -> tuple[LinkTiming, float, int]:
    """What a reader sees of a shaped link: its timing, and the seconds and bytes it took."""
    timing, seconds, total = LinkTiming(), 0.0, 0
    while total < MAX_LINK_BYTES:
        total += PIECE
        seconds = max(0.0, total - burst_bytes) * 8e-6 / mbps
        if timing.add(PIECE, seconds):
            break
    return timing, seconds, total


@given(st.floats(0.5, 2000.0))
def test_a_burst_at_full_speed_is_not_timed(mbps: float) -> None:
    timing, seconds, total = probe(mbps)
    assert timing.mbps() == pytest.approx(mbps, rel=0.02)
    assert seconds <= MOST_SECONDS + 8e-6 * PIECE / mbps
    assert total <= MAX_LINK_BYTES


def test_a_fast_link_takes_bytes_and_a_slow_one_takes_time() -> None:
    _, _, fast = probe(1000.0)
    _, seconds, slow = probe(1.0)
    assert fast == MAX_LINK_BYTES
    assert seconds >= MOST_SECONDS
    assert slow < MB


def test_too_little_says_nothing() -> None:
    timing = LinkTiming()
    assert timing.mbps() is None
    timing.add(PIECE, 0.0)
    timing.add(PIECE, 0.1)
    assert timing.mbps() is None
    timing.add(BURST * 2, 0.1)
    timing.add(PIECE, 0.1)  # no time went by
    assert timing.mbps() is None


def test_ranges_that_are_under_way_together_count_together() -> None:
    timing = TransferTiming()
    timing.began(A, 10.0)
    timing.began(A, 10.0)
    assert timing.running
    assert timing.ended(A, 4 * MB, 11.0, alone=True) is None
    assert timing.ended(A, 4 * MB, 12.0, alone=True) == pytest.approx(32.0)
    assert not timing.running


def test_transfers_that_say_nothing_about_the_link() -> None:
    timing = TransferTiming()
    timing.began(A, 0.0)
    assert timing.ended(A, MB, 1.0, alone=True) is None  # it may have been one burst
    timing.began(A, 2.0)
    assert timing.ended(A, 8 * MB, 3.0, alone=False) is None  # the sender served others too
    timing.began(A, 4.0)
    timing.began(B, 4.5)  # both come in over this device's radio
    assert timing.ended(A, 8 * MB, 5.0, alone=True) is None
    assert timing.ended(B, 8 * MB, 6.0, alone=True) is None
    timing.began(A, 7.0)
    assert timing.ended(A, 8 * MB, 7.0, alone=True) is None  # a clock that stands
    timing.began(A, 8.0)
    assert timing.ended(A, 8 * MB, 9.0, alone=True) == pytest.approx(64.0)
