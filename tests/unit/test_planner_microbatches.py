"""The number of microbatches: as good as trying every one, and no more than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import DoesNotFitError
from confidantd.planner.costs import PlanDevice, microbatch_seconds, stage_cost
from confidantd.planner.microbatches import NEARLY, Cut, best_cut, counts
from confidantd.planner.partition import cost
from confidantd.planner.plan import Plan, choose_plan
from confidantd.planner.workload import Method
from tests.unit.planner_support import GIGABYTE, SWARMS, device, everything, fits, workload


def cuts(
    devices: Sequence[PlanDevice], batch: int = 8, *, layers: int = 6, method: Method = "full"
) -> list[Cut]:
    """Every way to cut a batch that is compared."""
    return [
        Cut(
            workload(
                layers=layers, method=method, microbatch_size=batch // count, microbatches=count,
                saved_rows=20,
            ),
            tuple(devices),
        )
        for count in counts(batch)
    ]  # fmt: skip


def planned(devices: Sequence[PlanDevice], batch: int = 8, count: int = 0) -> Plan:
    """The explained plan over these devices; the first one is the owner's."""
    return choose_plan(cuts(devices, batch), devices[0].id, count=count, explained=True)


@given(batch=st.integers(1, 10**9))
def test_counts_are_divisors_from_one_to_many(batch: int) -> None:
    found = counts(batch)
    assert found[0] == 1
    assert all(batch % count == 0 for count in found)
    assert list(found) == sorted(set(found))
    assert len(found) <= 28  # 1.3 ** 27 is over 1024
    if batch <= 1024:
        assert found[-1] == batch


def test_counts_of_usual_batches() -> None:
    assert counts(8) == (1, 2, 4, 8)
    assert counts(12) == (1, 2, 3, 4, 6, 12)
    assert counts(7) == (1, 7)


@settings(deadline=None, max_examples=40)
@given(
    devices=SWARMS.filter(lambda devices: len(devices) < 4),
    batch=st.sampled_from([4, 6]),
    layers=st.integers(1, 6),
    method=st.sampled_from(["full", "lora"]),
    use_all=st.booleans(),
)
def test_as_good_as_brute_force(
    devices: list[PlanDevice], batch: int, layers: int, method: Method, *, use_all: bool
) -> None:
    owner, possible = devices[0].id, cuts(devices, batch, layers=layers, method=method)
    found = best_cut(possible, owner, use_all=use_all)
    costs = [
        cost(one, owner)
        for cut in possible
        for one in everything(cut.work, devices, use_all=use_all)
    ]
    if found is None:
        assert not costs
        return
    cut, best = found
    assert fits(cut.work, best)
    assert not use_all or set(best.devices) == set(devices)
    assert cost(best, owner) <= min(costs) * (1 + NEARLY) * (1 + 1e-8)


@settings(deadline=None)
@given(devices=SWARMS, more=st.integers(0, 2 * GIGABYTE), which=st.integers(0, 3))
def test_more_memory_is_never_slower_by_more_than_a_tie(
    devices: list[PlanDevice], more: int, which: int
) -> None:
    owner, index = devices[0].id, which % len(devices)
    richer = replace(devices[index], available_bytes=devices[index].available_bytes + more)
    before = best_cut(cuts(devices), owner, use_all=False)
    changed = [*devices[:index], richer, *devices[index + 1 :]]
    after = best_cut(cuts(changed), owner, use_all=False)
    if before is not None:
        assert after is not None
        assert cost(after[1], owner) <= cost(before[1], owner) * (1 + NEARLY) * (1 + 1e-8)


def test_a_device_alone_makes_no_more_runs_than_its_memory_asks_for() -> None:
    """Each run reads all weights and adds up all gradients once more."""
    plenty = planned([device("a")])
    assert plenty.microbatches < 8
    little = planned([device("a", available_bytes=plenty.stages[0].memory_bytes - 1)])
    assert little.microbatches > plenty.microbatches
    assert little.stages[0].memory_bytes < plenty.stages[0].memory_bytes


def test_a_pipeline_is_filled_unless_links_are_far_apart() -> None:
    near = [device(name) for name in "abc"]
    assert len(planned(near).stages) == 3
    assert planned(near).microbatches == 8
    far = [replace(d, round_trip_seconds=3.0) for d in near]
    apart = choose_plan(cuts(far), far[0].id, use_all=True)
    assert apart.microbatches < 8


def test_a_count_that_is_asked_for_is_kept_and_compared() -> None:
    devices = [device(name) for name in "abc"]
    free, asked = planned(devices), planned(devices, count=2)
    assert asked.microbatches == 2
    assert asked.seconds > free.seconds
    others = {o.microbatches: o.seconds for o in asked.explanation.other_counts}
    assert set(others) == {1, 4}
    assert others[4] is not None
    assert others[4] < asked.seconds
    (below,) = free.explanation.other_counts
    assert below.microbatches == 4
    assert below.seconds is not None
    assert below.seconds > free.seconds


def test_a_count_that_would_not_fit_has_no_seconds() -> None:
    saved = planned([device("a")], count=8).stages[0]
    again = planned([device("a", available_bytes=saved.memory_bytes - 1)], count=8).stages[0]
    assert again.form == "recompute"
    found = planned([device("a", available_bytes=again.memory_bytes)])
    assert found.microbatches == 8  # all others need more
    (other,) = found.explanation.other_counts
    assert (other.microbatches, other.seconds) == (4, None)


def test_what_fits_in_no_way_is_refused() -> None:
    with pytest.raises(DoesNotFitError):
        planned([device("a", available_bytes=10**8)])


def test_layers_that_a_user_insists_on_still_leave_the_count() -> None:
    devices = [device("a"), device("b")]
    found = choose_plan(cuts(devices), devices[0].id, use_all=True, layers=(4, 2), explained=True)
    assert [s.past_last_layer for s in found.stages] == [4, 6]
    assert found.microbatches > 1
    assert found.explanation.other_counts


def test_a_run_costs_something_however_little_it_computes() -> None:
    small = replace(workload(microbatch_size=1, microbatches=8), sequence_length=1)
    large = replace(workload(microbatch_size=8, microbatches=1), sequence_length=1)
    each, at_once = (
        microbatch_seconds(w, stage_cost(w, device("a"), 6, head=True)) for w in (small, large)
    )
    assert 8 * each > 2 * at_once
