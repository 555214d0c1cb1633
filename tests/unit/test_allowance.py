"""How much of something may happen in a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.net.allowance import Allowance, Allowances


@given(
    gaps=st.lists(st.floats(0, 3), max_size=60),
    per_second=st.floats(0.1, 50),
    burst=st.integers(1, 20),
)
def test_no_more_is_taken_than_what_was_there_and_what_came(
    gaps: list[float], per_second: float, burst: int
) -> None:
    allowance, now, taken = Allowance(per_second, burst), 100.0, 0
    for gap in gaps:
        now += gap
        taken += allowance.take(now)
    assert taken <= burst + (now - 100.0) * per_second + 1e-6


def test_all_is_there_at_first_and_comes_back() -> None:
    allowance = Allowance(2.0, 3.0)
    assert [allowance.take(5.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.take(5.5)
    assert not allowance.take(5.5)
    assert [allowance.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_who_takes_anyway_waits_as_long_as_it_takes() -> None:
    allowance = Allowance(10.0, 2.0)
    waits = [allowance.spend(amount, 1.0) for amount in (1.0, 1.0, 1.0, 2.5)]
    assert waits == pytest.approx([0.0, 0.0, 0.1, 0.35])


def test_each_has_its_own_and_the_longest_unseen_is_forgotten() -> None:
    some = Allowances(1.0, 1.0, remembered=2)
    assert some.take("a", 0.0)
    assert not some.take("a", 0.0)
    assert some.take("b", 0.0)
    assert not some.take("a", 0.0)
    assert some.take("c", 0.0)  # b is forgotten
    assert not some.take("a", 0.0)
    assert some.take("b", 0.0)
