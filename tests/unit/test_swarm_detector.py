"""The failure detector under a simulated clock."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from confidantd.swarm.detector import Detector


def _beating(seconds: int, jitter: float = 0.0, seed: int = 0) -> tuple[Detector, float]:
    """A connected detector that heard a heartbeat a second, and the time of the last one."""
    detector, rng, now = Detector(), random.Random(seed), 0.0
    detector.connected(0.0)
    for _ in range(seconds):
        now += 1.0 + rng.uniform(-jitter, jitter)
        detector.heard(now)
    return detector, now


def test_a_peer_never_heard_is_gone() -> None:
    assert Detector().state(5.0) == "gone"


def test_silence_makes_it_suspect_and_then_gone_in_three_seconds() -> None:
    detector, last = _beating(20)
    assert detector.state(last + 1.5) == "alive"
    assert detector.state(last + 2.5) == "suspect"
    assert detector.state(last + 3.1) == "gone"


def test_uneven_arrivals_make_it_patient_but_never_beyond_ten_seconds() -> None:
    detector, last = _beating(32, jitter=0.9)
    assert detector.state(last + 3.1) != "gone"
    assert detector.state(last + 10.1) == "gone"


def test_a_lost_connection_makes_it_suspect_at_once_and_a_refused_one_gone_soon() -> None:
    detector, last = _beating(20)
    detector.disconnected(last + 0.1)
    assert detector.state(last + 0.1) == "suspect"
    detector.refused()
    assert detector.state(last + 0.2) == "suspect"
    assert detector.state(last + 0.7) == "gone"


def test_a_connection_that_comes_back_in_time_leaves_no_trace() -> None:
    detector, last = _beating(20)
    detector.disconnected(last)
    detector.refused()
    detector.connected(last + 1.0)
    assert detector.state(last + 1.5) == "alive"


def test_goodbye_is_believed_at_once() -> None:
    detector, last = _beating(5)
    detector.said_goodbye()
    assert detector.state(last) == "gone"


def test_standing_still_oneself_is_not_held_against_the_peer() -> None:
    detector, last = _beating(20)
    detector.forgive(30.0)
    assert detector.state(last + 31.0) == "alive"
    assert detector.state(last + 34.0) == "gone"


@given(st.lists(st.floats(0.0, 60.0), max_size=40), st.floats(0.0, 100.0))
def test_phi_grows_with_silence(intervals: list[float], silence: float) -> None:
    detector, now = Detector(), 0.0
    detector.connected(0.0)
    for interval in [*intervals, 1.0]:
        now += interval
        detector.heard(now)
    assert detector.phi(now + silence) <= detector.phi(now + silence + 1.0)
