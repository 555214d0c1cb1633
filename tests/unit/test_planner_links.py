"""What a link costs: measured pairs before radios before the assumption."""

from __future__ import annotations

from dataclasses import replace

import pytest

from confidantd.planner.costs import (
    ASSUMED_MBPS,
    ASSUMED_ROUND_TRIP_SECONDS,
    PlanDevice,
    link_cost,
)
from confidantd.planner.partition import best_partition
from confidantd.wire.links import Link
from tests.unit.planner_support import device, workload

WORK = workload()
A, B, C = (device(name, mbps=None) for name in "abc")


def linked(one: PlanDevice, *links: tuple[PlanDevice, Link]) -> PlanDevice:
    return replace(one, links={other.id: link for other, link in links})


def mbps(first: PlanDevice, second: PlanDevice) -> float:
    """The bandwidth that a link's cost implies."""
    return 8e-6 * WORK.activation_bytes / link_cost(WORK, first, second).seconds


def test_the_measured_pair_counts_whoever_measured_it() -> None:
    a = linked(replace(A, bandwidth_mbps=5.0), (B, Link(200.0, 8.0)))
    for pair in ((a, B), (B, a)):
        assert mbps(*pair) == pytest.approx(200.0)
        assert link_cost(WORK, *pair).latency == pytest.approx(0.004)


def test_the_slower_direction_counts() -> None:
    a, b = linked(A, (B, Link(200.0, 8.0))), linked(B, (A, Link(120.0, 6.0)))
    assert mbps(a, b) == mbps(b, a) == pytest.approx(120.0)
    assert link_cost(WORK, a, b).latency == pytest.approx(0.003)


def test_without_a_value_the_slower_radio_counts_and_then_the_assumption() -> None:
    a = linked(replace(A, bandwidth_mbps=5.0), (B, Link(200.0)))
    assert mbps(a, C) == pytest.approx(5.0)
    assert mbps(B, C) == pytest.approx(ASSUMED_MBPS)
    only_trip = linked(replace(A, bandwidth_mbps=5.0), (B, Link(None, 2.0)))
    assert mbps(only_trip, B) == pytest.approx(5.0)
    assert link_cost(WORK, only_trip, B).latency == pytest.approx(0.001)
    bare = [replace(d, round_trip_seconds=None) for d in (B, C)]
    assert link_cost(WORK, *bare).latency == pytest.approx(ASSUMED_ROUND_TRIP_SECONDS / 2)


def test_a_plan_goes_around_one_slow_pair() -> None:
    """All radios are fast, but between the owner and b stands a wall."""
    slow = Link(0.5)
    owner = linked(device("owner"), (device("b"), slow))
    others = [device("b"), device("c")]
    found = best_partition(WORK, [owner, *others], owner.id, use_all=True)
    assert found is not None
    names = [d.name for d in found.devices]
    assert names == ["owner", "c", "b"]
