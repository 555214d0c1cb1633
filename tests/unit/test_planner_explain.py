"""What choices cost: each fact is checked by making that choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from confidantd.planner.costs import PlanDevice
from confidantd.planner.plan import Plan, seconds_of
from confidantd.planner.workload import Workload
from tests.unit.planner_support import device, make_plan, workload


def explained(
    work: Workload, devices: Sequence[PlanDevice], *, use_all: bool = False, layers: tuple = ()
) -> Plan:
    """The explained plan; the first device is the owner's."""
    return make_plan(work, devices, devices[0].id, use_all=use_all, layers=layers, explain=True)


def test_a_recomputing_stage_says_what_it_lacks_and_what_that_costs() -> None:
    work = workload(saved_rows=60)
    saved = explained(work, [device("a")])
    assert saved.explanation.recomputing == ()
    lacks = 1_000_000
    tight = device("a", available_bytes=saved.stages[0].memory_bytes - lacks)
    plan = explained(work, [tight])
    (stage,) = plan.explanation.recomputing
    assert (stage.device, stage.name, stage.short_bytes) == (tight.id, "a", lacks)
    assert stage.seconds == pytest.approx(saved.seconds)
    assert plan.seconds > stage.seconds


def test_only_the_stage_that_recomputes_is_named() -> None:
    work = workload(saved_rows=60, microbatches=16)
    devices = [device("a"), device("b")]
    ample = explained(work, devices, use_all=True, layers=(3, 3))
    tight = device("b", available_bytes=ample.stages[1].memory_bytes - 1)
    plan = explained(work, [devices[0], tight], use_all=True, layers=(3, 3))
    assert [stage.form for stage in plan.stages] == ["saved", "recompute"]
    (stage,) = plan.explanation.recomputing
    assert (stage.name, stage.short_bytes) == ("b", 1)
    assert stage.seconds == pytest.approx(ample.seconds)


def test_a_backend_that_counts_is_part_of_what_is_short() -> None:
    work = replace(workload(saved_rows=60), splits=True)
    only = replace(device("a"), backends=("cpu", "gpu"))
    ample = explained(work, [only]).stages[0]
    plan = explained(work, [replace(only, available_bytes=ample.memory_bytes - 7)])
    assert plan.stages[0].unmeasured == ("gpu",)
    assert plan.explanation.recomputing[0].short_bytes == 7


def test_what_the_user_insists_on_is_held_against_what_would_run() -> None:
    fast, slow = device("fast", gflops=100), device("slow", gflops=0.1)
    plan = explained(workload(), [fast, slow], use_all=True)
    faster = plan.explanation.faster
    assert faster is not None
    assert faster.devices == ("fast",)
    assert faster.seconds == make_plan(workload(), [fast], fast.id).seconds < plan.seconds
    assert explained(workload(), [fast, slow]).explanation.faster is None
    equal = [device(name) for name in "ab"]
    assert explained(workload(microbatches=16), equal, use_all=True).explanation.faster is None


def test_a_plan_is_not_slower_than_its_neighbours_as_simulated() -> None:
    """The closed form alone would take the wrong one of close plans now and then."""
    for speed in range(10, 60, 5):
        devices = [device("a", 50), device("b", speed), device("c", 8)]
        work = workload(layers=8, microbatches=4, saved_rows=20)
        plan = explained(work, devices)
        for other in plan.explanation.alternatives:
            factor = 1.05 if other.text_leaves else 1.0
            assert plan.seconds <= other.seconds * factor * (1 + 1e-9)


def test_an_alternative_says_when_the_text_would_leave_its_device() -> None:
    devices = [device("slow", gflops=45), device("fast", gflops=50)]
    plan = explained(workload(microbatches=1), devices)
    assert plan.stages[0].name == "slow"
    leaves = {other.devices: other.text_leaves for other in plan.explanation.alternatives}
    assert leaves[("fast",)]


def test_the_facts_are_keys_of_the_contract() -> None:
    work = workload(saved_rows=60)
    memory = explained(work, [device("a")]).stages[0].memory_bytes
    devices = [device("a", available_bytes=memory - 1), device("b", gflops=0.1)]
    said = explained(work, devices, use_all=True, layers=(5, 1)).to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["faster"]["devices"] == ["a"]
    assert said["alternatives"] == []
    assert said["other_microbatches"] == []
    free = explained(work, devices).to_json()
    assert set(free["recomputing"][0]) == {"device", "name", "short_bytes", "seconds"}
    assert set(free["alternatives"][0]) == {"devices", "layers", "seconds", "text_leaves"}
    assert free["faster"] is None
    assert (free["microbatch_size"], free["sequence_length"], free["load"]) == (2, 128, 1)


def test_the_seconds_of_a_plan_are_those_of_its_stages() -> None:
    devices = [device(name) for name in "ab"]
    plan = explained(workload(microbatches=16), devices)
    by_id = {d.id: d for d in devices}
    assert plan.seconds == seconds_of(
        workload(microbatches=16),
        [by_id[stage.device] for stage in plan.stages],
        [stage.past_last_layer - stage.first_layer for stage in plan.stages],
        [stage.form for stage in plan.stages],
    )
