"""Measured speeds: what plans make of them, and how steps correct them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.planner.costs import assumed_speeds, stage_cost
from confidantd.planner.speeds import block_seconds, corrected, scaled, valid, with_block
from confidantd.planner.workload import head_flops, stage_flops
from confidantd.wire.speeds import Speeds
from tests.unit.planner_support import device, workload

MEASURED = Speeds(
    forward=1.0, backward=2.0, forward_again=1.1, backward_again=2.9, head=5.0, embedding=0.5,
    update=1e-9,
)  # fmt: skip


def test_a_stage_takes_what_its_parts_were_measured_to_take() -> None:
    work = workload()
    holder = replace(device("a"), speeds=MEASURED)
    cost = stage_cost(work, holder, 3, head=True, embedding=True)
    assert cost.forward == pytest.approx(3 * 1.0)
    assert cost.backward == pytest.approx(3 * 2.0 + 5.0 + 0.5)
    parameters = 3 * work.block_parameters + work.embedding_parameters + work.head_parameters
    assert cost.update == pytest.approx(parameters * 1e-9)
    again = stage_cost(work, holder, 3, head=False, form="recompute")
    assert (again.forward, again.backward) == pytest.approx((3 * 1.1, 3 * 2.9))


def test_a_stage_passes_on_what_its_neighbours_need() -> None:
    work, holder = workload(), replace(device("a"), speeds=replace(MEASURED, message=0.25))
    middle = stage_cost(work, holder, 2, head=False)
    assert (middle.forward, middle.backward, middle.messages) == pytest.approx((2.5, 4.5, 0.5))
    first = stage_cost(work, holder, 2, head=False, embedding=True)
    assert (first.forward, first.backward) == pytest.approx((2.25, 4.75))  # 0.5 of the embedding
    alone = stage_cost(work, holder, 2, head=True, embedding=True)
    assert (alone.forward, alone.messages) == pytest.approx((2.0, 0.0))


def test_a_head_that_was_not_measured_runs_at_the_pace_of_the_blocks() -> None:
    work = workload()
    cost = stage_cost(work, replace(device("a"), speeds=replace(MEASURED, head=None)), 1, head=True)
    head = cost.backward - 2.0
    assert head == pytest.approx(3.0 * head_flops(work) / stage_flops(work, 1, head=False))


def test_computing_again_is_never_taken_to_be_faster() -> None:
    noisy = replace(MEASURED, forward_again=0.9, backward_again=1.5)
    assert sum(block_seconds(noisy, "recompute")) == pytest.approx(3.0)


def test_backends_together_change_the_block_only() -> None:
    found = with_block(MEASURED, 1.5, "saved")
    assert block_seconds(found, "saved") == pytest.approx((0.5, 1.0))
    assert (found.head, found.backward_again) == (MEASURED.head, MEASURED.backward_again)


def test_the_first_step_is_believed_and_later_ones_are_smoothed() -> None:
    found = corrected(MEASURED, predicted=3.0, measured=9.0, steps=0)
    assert sum(block_seconds(found, "saved")) == pytest.approx(9.0)
    assert found.head == pytest.approx(15.0)
    found = corrected(MEASURED, predicted=3.0, measured=9.0, steps=1)
    assert sum(block_seconds(found, "saved")) == pytest.approx(6.0)
    found = corrected(MEASURED, predicted=3.0, measured=9.0, steps=100)
    assert 3.0 < sum(block_seconds(found, "saved")) < 6.0
    for steps in range(20):
        predicted = sum(block_seconds(found, "saved"))
        found = corrected(found, predicted, measured=9.0, steps=100 + steps)
    assert sum(block_seconds(found, "saved")) == pytest.approx(9.0, rel=0.01)


def test_a_stage_that_rests_most_of_the_time_teaches_less() -> None:
    found = corrected(MEASURED, predicted=3.0, measured=2.0, steps=0, busy=0.25)
    assert sum(block_seconds(found, "saved")) == pytest.approx(2.75)


def test_a_clock_that_jumps_corrects_nothing() -> None:
    assert corrected(MEASURED, predicted=3.0, measured=3600.0, steps=0) == MEASURED
    assert corrected(MEASURED, predicted=3.0, measured=-1.0, steps=0) == MEASURED


@given(gflops=st.floats(0.01, 1e5), ratio=st.floats(0.01, 100.0))
def test_a_device_by_its_gflops_is_one_with_all_speeds_in_proportion(
    gflops: float, ratio: float
) -> None:
    work = workload()
    slower, found = assumed_speeds(work, gflops / ratio), assumed_speeds(work, gflops)
    assert valid(found)
    assert scaled(found, ratio).forward == pytest.approx(slower.forward)
    assert scaled(found, ratio).update == pytest.approx(slower.update)


@pytest.mark.parametrize(
    "wrong",
    [
        Speeds(forward=0.0),
        Speeds(forward=-1.0),
        Speeds(forward=float("nan")),
        replace(MEASURED, head=float("inf")),
        replace(MEASURED, update=-1e-9),
    ],
)
def test_what_cannot_be_seconds_is_not_used(wrong: Speeds) -> None:
    assert not valid(wrong)
    assert valid(MEASURED)
