"""The owner keeps both ends: rings that fit and are as fast as can be found."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import DeviceError, DoesNotFitError
from confidantd.planner.costs import PlanDevice
from confidantd.planner.ends import MOST_COST, both_ends
from confidantd.planner.memory import stage_memory
from confidantd.planner.partition import Partition, best_partition
from confidantd.planner.score import simulated_seconds
from confidantd.planner.workload import Form, Workload
from tests.unit.planner_support import GIGABYTE, device, make_plan, workload


def ring_of(work: Workload, devices: list[PlanDevice]) -> Partition | None:
    """With the first device as owner."""
    best = best_partition(work, devices, devices[0].id, use_all=False)
    assert best is not None
    return both_ends(work, devices, devices[0].id, best)


def memory_of(work: Workload, ring: Partition) -> dict[str, int]:
    """Of each device, both stages of the owner together."""
    last, found = len(ring.devices) - 1, dict[str, int]()
    for place, holder in enumerate(ring.devices):
        stage = stage_memory(
            work, ring.layers[place], embedding=place == 0, head=place == last, stage=place,
            stages=last + 1, form=ring.forms[place],
        )  # fmt: skip
        found[holder.name] = found.get(holder.name, 0) + stage.total
    return found


def brute_force(work: Workload, devices: list[PlanDevice]) -> float:
    """The shortest step of all rings in saved form."""
    owner, others, best = devices[0], devices[1:], float("inf")
    for size in range(1, len(others) + 1):
        for between in itertools.permutations(others, size):
            order = [owner, *between, owner]
            saved: tuple[Form, ...] = ("saved",) * len(order)
            for cuts in itertools.product(range(work.layers + 1), repeat=size + 1):
                layers = [*cuts, work.layers - sum(cuts)]
                if layers[-1] < 0 or 0 in layers[1:-1]:
                    continue
                best = min(
                    best,
                    simulated_seconds(work, Partition(tuple(order), tuple(layers), saved, 0.0)),
                )
    return best


@settings(deadline=None, max_examples=15)
@given(
    gflops=st.lists(st.floats(10, 100), min_size=2, max_size=3),
    mbps=st.floats(20, 2000),
    microbatches=st.sampled_from([1, 4]),
)
def test_a_ring_is_close_to_the_best_of_all(
    gflops: list[float], mbps: float, microbatches: int
) -> None:
    work = workload(layers=5, microbatches=microbatches)
    devices = [device(n, gflops=g, mbps=mbps) for n, g in zip("abc", gflops, strict=False)]
    ring = ring_of(work, devices)
    assert ring is not None
    assert ring.devices[0].id == ring.devices[-1].id == devices[0].id
    assert sum(ring.layers) == work.layers
    assert ring.seconds <= 1.15 * brute_force(work, devices)


@settings(deadline=None, max_examples=30)
@given(memory=st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_both_stages_of_the_owner_count_against_its_memory(memory: list[int]) -> None:
    work = workload(layers=8)
    devices = [
        device(n, available_bytes=GIGABYTE * size // 2)
        for n, size in zip("abc", memory, strict=True)
    ]
    best = best_partition(work, devices, devices[0].id, use_all=False)
    if best is None:
        return
    ring = both_ends(work, devices, devices[0].id, best)
    if ring is not None:
        caps = {d.name: d.available_bytes for d in devices}
        assert all(needs <= caps[name] for name, needs in memory_of(work, ring).items())


def test_a_ring_costs_more_over_a_slow_network() -> None:
    work = workload(layers=8, microbatches=16)

    def cost(mbps: float) -> float:
        devices = [device(name, mbps=mbps) for name in "abc"]
        ring = ring_of(work, devices)
        best = best_partition(work, devices, devices[0].id, use_all=False)
        assert ring is not None
        assert best is not None
        return ring.seconds / best.seconds - 1

    assert cost(10_000) < MOST_COST < cost(10)


@pytest.mark.parametrize("count", [1, 2])
def test_there_is_no_ring_for_one_device_or_for_generation(count: int) -> None:
    devices = [device(name) for name in "ab"[:count]]
    work = workload(method="full" if count == 1 else None)
    assert ring_of(work, devices) is None


def test_an_owner_who_insists_keeps_both_ends_whatever_that_costs() -> None:
    slow, fast, third = device("owner", gflops=1), device("fast", gflops=500), device("third")
    work, mine = workload(), slow.id
    alone = make_plan(work, [slow, fast], mine, ends="always")
    assert alone.stages[0].device == alone.stages[-1].device == mine
    everybody = make_plan(work, [slow, fast, third], mine, use_all=True, ends="always")
    assert [stage.name for stage in everybody.stages][:: len(everybody.stages) - 1] == ["owner"] * 2
    assert {stage.name for stage in everybody.stages} == {"owner", "fast", "third"}
    with pytest.raises(DeviceError, match="takes no part"):
        make_plan(work, [fast, third], mine, ends="always")
    small = device("owner", available_bytes=300_000_000)
    with pytest.raises(DoesNotFitError, match="both ends"):
        make_plan(work, [small, fast], small.id, ends="always")


@pytest.mark.parametrize("mbps", [1, 10, 100, 10_000])
def test_by_default_both_ends_are_kept_just_where_that_costs_little(mbps: float) -> None:
    work, devices = workload(layers=8, microbatches=16), [device(n, mbps=mbps) for n in "abc"]
    owner = devices[0].id
    auto, straight, ring = (
        make_plan(work, devices, owner, use_all=True, ends=ends)
        for ends in ("auto", "never", "always")
    )
    cheap = ring.seconds <= (1 + MOST_COST) * straight.seconds
    assert auto.seconds == (ring.seconds if cheap else straight.seconds)
    assert (auto.stages[-1].device == owner) == cheap
    assert cheap == (mbps > 50)
