"""Plans that change while a job runs: a device that gets slow, and one that promised too much."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import control_groups, reference
from tests.control_groups import CpuQuota, quotas
from tests.e2e.devices import Device, running
from tests.e2e.small_models import TEXT, byte_tokenizer

pytestmark = pytest.mark.alone

STEPS, THROTTLED_AFTER, BATCH, LENGTH, RATE = 45, 5, 8, 64, 1e-3
LOSS_TOLERANCE = 1e-4
# Of private writable memory (KiB): a worker starts with it, and cannot hold half of the model.
TOO_LITTLE = 420_000


@dataclass(frozen=True)
class Swarm:
    """Anna, Ben whose processor can be throttled, and Cleo who has less memory than it seems."""

    devices: list[Device]
    quota: CpuQuota

    @property
    def owner(self) -> Device:
        """Who has model and text."""
        return self.devices[0]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three daemons that the tests share."""
    if not control_groups.available():
        pytest.skip("needs root and the cpu controller of control groups")
    folder = tmp_path_factory.mktemp("swarm")
    limited = ("sh", "-c", f'ulimit -d {TOO_LITTLE} && exec "$@"', "sh")
    with quotas(None) as (quota,):
        devices = [
            Device(folder / "anna", "anna"),
            Device(folder / "ben", "ben", prefix=quota.prefix),
            Device(folder / "cleo", "cleo", prefix=limited),
        ]
        with running(devices):
            yield Swarm(devices, quota)


@pytest.fixture(autouse=True)
def whole_core(swarm: Swarm) -> None:
    """Ben is as fast as ever when a test begins, also after one that failed."""
    swarm.quota.set(None)


def make_model(folder: Path, hidden: int, columns: int, positions: int = 256) -> Path:
    """A random Llama of eight blocks with tied ends."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=257, hidden_size=hidden, intermediate_size=columns, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=positions,
        tie_word_embeddings=True, initializer_range=0.05, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def test_a_throttled_stage_gives_layers_away_and_no_number_changes(
    swarm: Swarm, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", 192, 512)
    command = swarm.owner.cli_command(
        "train", str(model), "--data", str(TEXT), "--output", str(tmp_path / "out"),
        "--steps", str(STEPS), "--batch-size", str(BATCH), "--microbatches", "4",
        "--sequence-length", str(LENGTH), "--learning-rate", str(RATE), "--warmup-steps", "2",
        "--no-shuffle", "--devices", "anna,ben", "--json",
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=swarm.owner.environment()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "step" and events[-1]["step"] == THROTTLED_AFTER:
                swarm.quota.set(0.1)
    assert events[-1]["event"] == "done", events[-1]
    before, *_, after = [event["stages"] for event in events if event["event"] == "plan"]
    replans = [event for event in events if event["event"] == "replan"]
    assert replans[0]["resumed_from_step"] <= THROTTLED_AFTER + 20
    epochs = [event["epoch"] for event in replans]
    assert epochs == sorted(set(epochs))
    assert epochs[0] > 1

    def layers(stages: list[dict[str, Any]]) -> int:
        first, past_last = next(s["layers"] for s in stages if s["name"] == "ben")
        return int(past_last - first)

    assert layers(after) < layers(before)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    blocks = reference.blocks_of(model, [TEXT], LENGTH)
    run = reference.train(
        reference.load(model), blocks, steps=STEPS, batch_size=BATCH, learning_rate=RATE,
        warmup_steps=2,
    )  # fmt: skip
    assert [event["loss"] for event in steps] == pytest.approx(run.losses, rel=LOSS_TOLERANCE)
    assert swarm.owner.json("status")["memory"]["granted_bytes"] == 0


def test_a_device_with_less_memory_than_it_says_fails_alone(swarm: Swarm, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", 768, 2304)
    swarm.quota.set(0.1)  # Cleo is worth asking for help, Ben is not
    events = swarm.owner.events(
        "train", str(model), "--data", str(TEXT), "--output", str(tmp_path / "out"),
        "--steps", "2", "--batch-size", "4", "--microbatches", "2", "--sequence-length", "32",
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    first, *_, last = [event for event in events if event["event"] == "plan"]
    assert "cleo" in [stage["name"] for stage in first["stages"]]
    assert "cleo" not in [stage["name"] for stage in last["stages"]]
    (reason,) = [out["reason"] for out in last["left_out"] if out["name"] == "cleo"]
    assert "failed" in reason
    replan = next(event for event in events if event["event"] == "replan")
    assert (replan["epoch"], replan["resumed_from_step"]) == (2, 0)
    assert "cleo" in replan["reason"]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == [1, 2]
    for device in swarm.devices:
        assert device.process is not None
        assert device.process.poll() is None
