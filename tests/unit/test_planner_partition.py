"""Partitions against brute force: never above a device's memory, never slower than the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from confidantd.errors import DoesNotFitError
from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice
from confidantd.planner.partition import best_partition, cost
from confidantd.planner.workload import Workload
from tests.unit.planner_support import (
    GIGABYTE,
    SWARMS,
    device,
    everything,
    fits,
    make_plan,
    workload,
)

WORKLOADS = st.builds(
    workload,
    layers=st.integers(1, 8),
    method=st.sampled_from(["full", "lora", None]),
    microbatch_size=st.integers(1, 3),
    microbatches=st.integers(1, 9),
    tied=st.booleans(),
    saved_rows=st.integers(0, 60),
    load=st.integers(0, 12),
)


# Messages of a stage were taken for those of each of its layers, and a pipeline for slower than
# it is before it was complete.
@example(
    work=workload(layers=3, method="lora", microbatch_size=1),
    devices=[
        device("d0", 21.0, 241_965_056, 900.0),
        device("d1", 38.0, 258_608_129, None),
        device("d2", 3.0, 258_608_284, 900.0),
    ],
    use_all=False,
)
@settings(deadline=None, max_examples=60)
@given(work=WORKLOADS, devices=SWARMS, use_all=st.booleans())
def test_as_good_as_brute_force(work: Workload, devices: list[PlanDevice], use_all: bool) -> None:
    owner = devices[0].id
    found = best_partition(work, devices, owner, use_all=use_all)
    every = list(everything(work, devices, use_all=use_all))
    if found is None:
        assert not every
        return
    assert fits(work, found)
    assert sum(found.layers) == work.layers
    assert not use_all or set(found.devices) == set(devices)
    assert cost(found, owner) == pytest.approx(min(cost(p, owner) for p in every), rel=1e-8)


@given(work=WORKLOADS, devices=SWARMS, more=st.integers(0, 2 * GIGABYTE), which=st.integers(0, 2))
def test_more_memory_is_never_slower(
    work: Workload, devices: list[PlanDevice], more: int, which: int
) -> None:
    owner = devices[0].id
    before = best_partition(work, devices, owner, use_all=False)
    index = which % len(devices)
    richer = replace(devices[index], available_bytes=devices[index].available_bytes + more)
    changed = [*devices[:index], richer, *devices[index + 1 :]]
    after = best_partition(work, changed, owner, use_all=False)
    if before is not None:
        assert after is not None
        assert cost(after, owner) <= cost(before, owner) * (1 + 1e-8)


@given(work=WORKLOADS, devices=SWARMS, times=st.floats(1, 20), which=st.integers(0, 3))
def test_a_faster_device_is_never_slower(
    work: Workload, devices: list[PlanDevice], times: float, which: int
) -> None:
    owner, index = devices[0].id, which % len(devices)
    before = best_partition(work, devices, owner, use_all=False)
    faster = replace(devices[index], gflops=devices[index].gflops * times)
    changed = [*devices[:index], faster, *devices[index + 1 :]]
    after = best_partition(work, changed, owner, use_all=False)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert cost(after, owner) <= cost(before, owner) * (1 + 1e-8)


def test_what_is_computed_again_is_counted() -> None:
    """Two devices hold the model recomputing; with a third one nothing is computed twice."""
    work = workload(layers=6, microbatches=12, saved_rows=60)
    small, owner = 1_200_000_000, device("a").id
    two = best_partition(
        work, [device(n, available_bytes=small) for n in "ab"], owner, use_all=True
    )
    three = best_partition(
        work, [device(n, available_bytes=small) for n in "abc"], owner, use_all=True
    )
    assert two is not None
    assert three is not None
    assert "recompute" in two.forms
    assert set(three.forms) == {"saved"}


def test_equal_devices_share_equally() -> None:
    devices = [device(name, gflops=50) for name in "abc"]
    for method in ("lora", None):
        work = replace(workload(method=method, microbatches=8), vocabulary=16)  # a light head
        found = best_partition(work, devices, devices[0].id, use_all=True)
        assert found is not None
        assert found.layers == (2, 2, 2)


def test_a_faster_device_gets_more_layers() -> None:
    slow, fast = device("slow", gflops=20), device("fast", gflops=60)
    found = best_partition(workload(layers=8, microbatches=16), [slow, fast], slow.id, use_all=True)
    assert found is not None
    assert dict(zip(found.devices, found.layers, strict=True))[fast] > 4


def test_the_owner_is_first_among_equals() -> None:
    devices = [device(name) for name in "abc"]
    for owner in devices:
        found = best_partition(workload(microbatches=16), devices, owner.id, use_all=True)
        assert found is not None
        assert found.devices[0] == owner


def test_a_device_that_slows_the_whole_is_left_out() -> None:
    fast, slow = device("fast", gflops=100), device("slow", gflops=0.1)
    found = best_partition(workload(), [fast, slow], fast.id, use_all=False)
    assert found is not None
    assert found.devices == (fast,)
    slow_link = device("far", gflops=100, mbps=0.1)
    found = best_partition(workload(), [fast, slow_link], fast.id, use_all=False)
    assert found is not None
    assert found.devices == (fast,)


def test_an_insisted_device_is_used_however_slow() -> None:
    fast, slow = device("fast", gflops=100), device("slow", gflops=0.1)
    found = best_partition(workload(), [fast, slow], fast.id, use_all=True)
    assert found is not None
    assert set(found.devices) == {fast, slow}


def test_small_devices_together_hold_what_none_could_alone() -> None:
    work = workload(layers=12)
    devices = [device(name, available_bytes=1_400_000_000) for name in "abcd"]
    assert best_partition(work, devices[:1], devices[0].id, use_all=False) is None
    found = best_partition(work, devices, devices[0].id, use_all=False)
    assert found is not None
    assert fits(work, found)


@pytest.mark.parametrize("count", [7, 12])
def test_many_devices(count: int) -> None:
    """Where not every order is tried, the plan still fits and beats the best single device."""
    work = workload(layers=24, microbatches=16)
    devices = [device(f"d{i}", 10 + 7 * i, (2 + i % 3) * GIGABYTE) for i in range(count)]
    found = best_partition(work, devices, devices[0].id, use_all=False)
    assert found is not None
    assert fits(work, found)
    spacious = replace(devices[-1], available_bytes=1000 * GIGABYTE)
    alone = best_partition(work, [spacious], DeviceId(spacious.id), use_all=False)
    assert alone is not None
    assert found.seconds < alone.seconds


def test_layers_that_a_user_insists_on_are_kept_in_their_order() -> None:
    work, devices = workload(layers=6), [device("slow", gflops=5.0), device("fast", gflops=80.0)]
    plan = make_plan(work, devices, devices[1].id, use_all=True, layers=(4, 2))
    assert [(s.name, s.past_last_layer - s.first_layer) for s in plan.stages] == [
        ("slow", 4), ("fast", 2),
    ]  # fmt: skip
    free = make_plan(work, devices, devices[1].id, use_all=True)
    assert free.seconds < plan.seconds


def test_layers_that_do_not_fit_where_the_user_wants_them_are_refused() -> None:
    work = workload(layers=6)
    devices = [device("small", available_bytes=600_000_000), device("large")]
    with pytest.raises(DoesNotFitError):
        make_plan(work, devices, devices[0].id, use_all=True, layers=(5, 1))
