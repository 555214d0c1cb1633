"""Plans as the contract prints them, and refusals that name who is short and what would fit."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest

from confidantd.errors import DeviceError, DoesNotFitError
from confidantd.planner.costs import PlanDevice
from confidantd.planner.plan import StagePlan
from confidantd.planner.workload import Workload
from tests.unit.planner_support import GIGABYTE, device, make_plan, workload


def test_a_plan_has_the_keys_of_the_contract() -> None:
    devices = [device(name) for name in "abc"]
    plan = make_plan(workload(microbatches=16), devices, devices[0].id, use_all=True).to_json()
    assert json.loads(json.dumps(plan)) == plan
    assert plan["objective"] == "train"
    stages = plan["stages"]
    assert [stage["embedding"] for stage in stages] == [True, False, False]
    assert [stage["head"] for stage in stages] == [False, False, True]
    assert stages[0]["layers"][0] == 0
    assert stages[-1]["layers"][1] == 6
    for before, after in itertools.pairwise(stages):
        assert before["layers"][1] == after["layers"][0]
    assert {"device", "name", "memory_bytes", "seconds", "backends"} <= set(stages[0])
    assert stages[0]["backends"] == [{"name": "cpu", "heads": 12, "columns": 2048}]
    assert [(k["from"], k["to"]) for k in plan["links"]] == [
        (stages[0]["device"], stages[1]["device"]),
        (stages[1]["device"], stages[2]["device"]),
    ]
    assert plan["links"][0]["bytes"] == 2 * 16 * 4 * 2 * 128 * 768
    predicted = plan["predicted"]
    assert predicted["tokens_per_second"] == pytest.approx(16 * 2 * 128 / predicted["step_seconds"])


def test_one_device_alone_generates() -> None:
    only = device("only")
    plan = make_plan(workload(method=None), [only], only.id)
    assert plan.objective == "generate"
    assert len(plan.stages) == 1
    assert plan.links == ()
    assert plan.tokens_per_second == pytest.approx(1 / plan.seconds)


def test_devices_left_out_have_a_reason() -> None:
    fast = device("fast", gflops=200)
    others = [device("tiny", available_bytes=1), device("slow", gflops=0.1)]
    plan = make_plan(workload(), [fast, *others], fast.id)
    reasons = {left.name: left.reason for left in plan.left_out}
    assert "MB more memory" in reasons["tiny"]
    assert "longer" in reasons["slow"]


def test_what_does_not_fit_names_every_device_that_is_short() -> None:
    devices = [device("anna", available_bytes=200_000_000), device("ben", available_bytes=1)]
    with pytest.raises(DoesNotFitError) as failure:
        make_plan(workload(), devices, devices[0].id)
    assert "anna is" in failure.value.message
    assert "ben is" in failure.value.message
    assert "MB short of" in failure.value.message
    assert "one more device" in failure.value.hint


def refusal(work: Workload, *devices: PlanDevice) -> DoesNotFitError:
    """Of a plan over these devices."""
    with pytest.raises(DoesNotFitError) as failure:
        make_plan(work, devices, devices[0].id)
    return failure.value


def test_the_smallest_changes_that_fit_are_said() -> None:
    only = device("only", available_bytes=1_000_000_000)
    said = refusal(workload(), only)
    extra = re.fullmatch(r"it fits with --method lora, or one more device with (\d+) MB for jobs",
                         said.hint)  # fmt: skip
    assert extra is not None
    assert "only is" in said.message
    assert "MB short of the" in said.message
    more = device("more", available_bytes=1_000_000 * int(extra[1]) + 1_000_000)
    make_plan(workload(), [only, more], only.id)
    refusal(workload(), only, replace(more, available_bytes=more.available_bytes - 140_000_000))


def test_a_batch_in_more_pieces_is_said_and_no_more_of_them_than_needed() -> None:
    large = workload(method="lora", microbatch_size=32, microbatches=1, saved_rows=8)
    only = device("only", available_bytes=900_000_000)
    found = re.search(r"--microbatches (\d+)", refusal(large, only).hint)
    assert found is not None
    pieces = int(found[1])

    def cut(count: int) -> Workload:
        rows = 32 // count
        return workload(method="lora", microbatch_size=rows, microbatches=count, saved_rows=8)

    make_plan(cut(pieces), [only], only.id)
    refusal(cut(pieces // 2), only)


def test_where_nothing_helps_memory_is_asked_for() -> None:
    tiny = device("tiny", available_bytes=1)
    assert refusal(workload(layers=1), tiny).hint == "free memory on these devices"


def test_an_insisted_device_that_is_too_small() -> None:
    devices = [device("large"), device("tiny", available_bytes=1)]
    with pytest.raises(DoesNotFitError) as failure:
        make_plan(workload(), devices, devices[0].id, use_all=True)
    assert "tiny is" in failure.value.message
    assert "fewer --devices" in failure.value.hint


def test_more_devices_than_layers() -> None:
    devices = [device(f"d{i}", available_bytes=9 * GIGABYTE) for i in range(3)]
    with pytest.raises(DeviceError, match="3 devices cannot share 2 layers"):
        make_plan(workload(layers=2), devices, devices[0].id, use_all=True)
    assert len(make_plan(workload(layers=2), devices, devices[0].id).stages) <= 2


def test_backends_are_measured_only_for_blocks_that_are_worth_it() -> None:
    only = replace(device("only"), backends=("cpu", "gpu"))
    for splits, unmeasured in ((False, []), (True, ["gpu"])):
        work = replace(workload(), splits=splits)
        (stage,) = make_plan(work, [only], only.id).to_json()["stages"]
        assert stage["unmeasured_backends"] == unmeasured
        assert [share["name"] for share in stage["backends"]] == ["cpu"]


def test_further_backends_get_work_where_there_is_memory_for_them() -> None:
    """They gain more than the saved form, and a plan never fails for want of their memory."""
    work = replace(workload(), splits=True, saved_floats=40 * 2 * 128 * 768)

    def stage(available_bytes: int) -> StagePlan:
        only = replace(device("a", available_bytes=available_bytes), backends=("cpu", "gpu"))
        return make_plan(work, [only], only.id).stages[0]

    most = stage(100 * GIGABYTE)
    assert (most.form, most.unmeasured, most.cpu_only) == ("saved", ("gpu",), False)
    less = stage(most.memory_bytes - 1)
    assert (less.form, less.unmeasured, less.cpu_only) == ("recompute", ("gpu",), False)
    lean = stage(less.memory_bytes - 1)
    assert (lean.unmeasured, lean.cpu_only) == ((), True)
    least = stage(lean.memory_bytes - 1)
    assert (least.form, least.cpu_only) == ("recompute", True)
    with pytest.raises(DoesNotFitError):
        stage(least.memory_bytes - 1)


def test_the_next_best_plans_are_listed() -> None:
    """Of other lengths, the faster one first; what does not fit alone is none."""
    devices = [device(name) for name in "abc"]
    plan = make_plan(workload(microbatches=16), devices, devices[0].id, explain=True)
    assert len(plan.stages) == 3
    first, second = plan.explanation.alternatives
    assert (len(first.devices), len(second.devices)) == (2, 1)
    assert plan.seconds < first.seconds < second.seconds
    assert first.devices[0] == second.devices[0] == "a"
    assert sum(first.layers) == sum(second.layers) == 6
    small = [device(name, available_bytes=1_400_000_000) for name in "abcd"]
    large = make_plan(workload(layers=12), small, small[0].id, explain=True)
    assert all(len(other.devices) > 1 for other in large.explanation.alternatives)
