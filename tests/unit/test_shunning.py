"""How long a device that talks nonsense is left alone."""

from __future__ import annotations

from confidantd.ids import DeviceId
from confidantd.net.shunning import (
    FIRST_SECONDS,
    FORGIVEN_SECONDS,
    MOST_SECONDS,
    REMEMBERED,
    Shunning,
)

A, B = DeviceId("a" * 64), DeviceId("b" * 64)


def test_longer_each_time_and_never_for_ever() -> None:
    shunning, now = Shunning(), 50.0
    waits = []
    for _ in range(8):
        shunning.offended(A, now)
        waits.append(shunning.left(A, now))
        now += waits[-1]
        assert shunning.left(A, now) == 0
    assert waits[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert waits[-1] == MOST_SECONDS
    assert shunning.left(B, now) == 0


def test_it_is_forgiven_after_a_while() -> None:
    shunning = Shunning()
    shunning.offended(A, 0.0)
    shunning.offended(A, 10.0)
    later = 10.0 + 2 * FIRST_SECONDS + FORGIVEN_SECONDS
    shunning.offended(A, later)
    assert shunning.left(A, later) == FIRST_SECONDS


def test_not_everybody_is_remembered() -> None:
    shunning = Shunning()
    for number in range(REMEMBERED + 1):
        shunning.offended(DeviceId(f"{number:064x}"), 1.0)
    assert shunning.left(DeviceId(f"{0:064x}"), 1.0) == 0
    assert shunning.left(DeviceId(f"{1:064x}"), 1.0) > 0
