"""Which devices a job gets: memory that one alone lacks, and one that is too slow to help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from confidantd.ids import DeviceId, JobId
from confidantd.jobs.options import PlanOptions
from confidantd.jobs.plan_inputs import plan_workload
from confidantd.jobs.setup import train_workload
from confidantd.planner.costs import PlanDevice
from tests import control_groups
from tests.control_groups import quotas
from tests.e2e.devices import Device, running, wait_until
from tests.e2e.small_models import TEXT, byte_tokenizer
from tests.unit.planner_support import make_plan

pytestmark = pytest.mark.alone

SHAPE = {"batch_size": 4, "microbatches": 4, "sequence_length": 32}
TOO_LARGE = 1.6  # times what one device has
SLOW = 0.1  # of a core
LOST_SECONDS, START_SECONDS = 15.0, 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, most of whose weights are its two ends."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40_000, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=False, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def cap(model: Path) -> int:
    """Bytes for jobs on each device: training on one takes 1.6 times as much."""
    workload = train_workload(PlanOptions(str(model), **SHAPE))
    work = plan_workload(workload.plan_request(JobId("x"), 1, ()))
    alone = PlanDevice(DeviceId("x"), "x", 1 << 50, 50.0)
    return int(make_plan(work, [alone], alone.id).stages[0].memory_bytes / TOO_LARGE)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory, cap: int) -> Iterator[list[Device]]:
    """Anna, Ben, and Cleo who is slow."""
    if not control_groups.available():
        pytest.skip("needs root and the cpu controller of control groups")
    folder = tmp_path_factory.mktemp("swarm")
    memory = ("--memory", str(cap))
    with quotas(SLOW) as (quota,):
        found = [
            Device(folder / "anna", "anna", *memory),
            Device(folder / "ben", "ben", *memory),
            Device(folder / "cleo", "cleo", *memory, prefix=quota.prefix),
        ]
        with running(found):
            yield found


def shape() -> list[str]:
    """As options."""
    return [word for k, v in SHAPE.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def train(owner: Device, model: Path, output: Path, steps: int) -> dict[str, Any]:
    """The `done` event, with the `plan`."""
    events = owner.events(
        "train", str(model), "--data", str(TEXT), "--output", str(output), "--steps", str(steps),
        *shape(),
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    return {**events[-1], "plan": next(e for e in events if e["event"] == "plan")}


def test_what_one_device_cannot_hold_is_trained_over_two_and_a_slow_third_is_left_out(
    devices: list[Device], model: Path, cap: int, tmp_path: Path
) -> None:
    done = train(devices[0], model, tmp_path / "out", 2)
    assert {stage["name"] for stage in done["stages"]} == {"anna", "ben"}
    for name in ("anna", "ben"):
        peaks = [s["peak_memory_bytes"] for s in done["stages"] if s["name"] == name]
        assert sum(peaks) <= cap
    (left_out,) = done["plan"]["left_out"]
    assert left_out["name"] == "cleo"
    assert "longer" in left_out["reason"]


def test_two_jobs_are_never_promised_the_same_memory(
    devices: list[Device], model: Path, cap: int, tmp_path: Path
) -> None:
    anna = devices[0]
    job = anna.json(
        "train", str(model), "--data", str(TEXT), "--output", str(tmp_path / "out"), "--steps",
        "100000", *shape(), "--devices", "anna,ben", "--detach",
    )["job"]  # fmt: skip

    def runs() -> bool:
        shown = anna.json("jobs", "show", job)
        assert shown["state"] != "failed", shown["message"]
        return bool(shown["step"] > 0)

    wait_until(runs, START_SECONDS, "it runs")
    granted = [device.json("status")["memory"]["granted_bytes"] for device in devices[:2]]
    assert all(0 < each <= cap for each in granted)
    refused = anna.cli("plan", str(model), *shape(), "--devices", "anna,ben", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["code"] == "does-not-fit"
    anna.json("jobs", "cancel", job)

    def fits() -> bool:
        return anna.cli("plan", str(model), *shape(), "--devices", "anna,ben").returncode == 0

    wait_until(fits, START_SECONDS, "its memory is free again")


def test_a_slow_device_is_used_where_it_is_the_only_other_one(
    devices: list[Device], model: Path, tmp_path: Path
) -> None:
    anna, ben, _ = devices
    ben.stop()
    wait_until(lambda: anna.states()["ben"] == "gone", LOST_SECONDS, "Ben is gone")
    done = train(anna, model, tmp_path / "out", 1)
    assert {stage["name"] for stage in done["stages"]} == {"anna", "cleo"}
