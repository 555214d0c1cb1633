"""Training that loses workers, devices, its coordinator or its owner's daemon: it goes on, and no
number is another than without.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import reference
from tests.e2e.devices import Device, swarm, wait_until
from tests.e2e.small_models import Small, make_small
from tests.e2e.test_equal_to_one_machine import LOSS_TOLERANCE, RATE, WEIGHT_TOLERANCE
from tests.e2e.test_jobs import END_SECONDS, record, talks_to, wait_for_no_workers, workers

STEPS, BATCH, FAULT_AFTER = 60, 8, 15
RUN_SECONDS = 120.0
Fault = Callable[[list[Device]], object]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama with tied ends."""
    return make_small("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Device]]:
    """Three daemons; the first one owns the job."""
    with swarm(tmp_path / "swarm", 3) as found:
        yield found


def command(owner: Device, small: Small, output: Path, *options: str) -> list[str]:
    """Training over all three devices."""
    return owner.cli_command(
        "train", str(small.folder), "--data", str(small.text), "--output", str(output),
        "--steps", str(STEPS), "--batch-size", str(BATCH), "--microbatches", "2",
        "--sequence-length", str(small.length), "--learning-rate", str(RATE),
        "--warmup-steps", "2", "--no-shuffle", "--devices", "anna,ben,cleo",
        "--owner-ends", "never", "--json", *options,
    )  # fmt: skip


def disturbed(
    devices: list[Device], small: Small, output: Path, fault: Fault, *options: str
) -> list[dict[str, Any]]:
    """The events of a job that something happens to after some steps."""
    owner = devices[0]
    events: list[dict[str, Any]] = []
    with subprocess.Popen(
        command(owner, small, output, *options), stdout=subprocess.PIPE, text=True,
        env=owner.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            kept = events[-1].get("checkpoint") if events[-1]["event"] == "step" else None
            if kept is not None and events[-1]["step"] >= FAULT_AFTER and fault is not None:
                fault(devices)
                fault = None  # type: ignore[assignment]
    assert fault is None
    return events


def check(events: list[dict[str, Any]], run: reference.Run, output: Path, file: str) -> None:
    """Every step was done, those after the loss from where the job went back to, and every loss
    and weight is the reference's.
    """
    assert events[-1]["event"] == "done", events[-1]
    losses: dict[int, float] = {}
    for event in events:
        if event["event"] == "step":
            assert event["step"] == max(losses, default=0) + 1
            losses[event["step"]] = event["loss"]
        if event["event"] == "replan":
            losses = {s: loss for s, loss in losses.items() if s <= event["resumed_from_step"]}
    assert [losses[step] for step in sorted(losses)] == pytest.approx(
        run.losses, rel=LOSS_TOLERANCE
    )
    found = load_file(output / file)
    wanted = {name.replace(".default.", "."): tensor for name, tensor in run.weights.items()}
    assert found
    for name, tensor in found.items():
        off = float((tensor - wanted[name]).abs().max())
        assert off <= WEIGHT_TOLERANCE * float(wanted[name].abs().max()), name


def full_run(small: Small) -> reference.Run:
    """The job in one process of torch."""
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    return reference.train(
        reference.load(small.folder), blocks, steps=STEPS, batch_size=BATCH,
        learning_rate=RATE, warmup_steps=2,
    )  # fmt: skip


def replans(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was said of new epochs."""
    found = [event for event in events if event["event"] == "replan"]
    epochs = [event["epoch"] for event in found]
    assert epochs == sorted(set(epochs))
    return found


FAULTS: dict[str, Fault] = {
    "a worker": lambda devices: workers(devices[1])[0].kill(),
    "a device": lambda devices: devices[1].kill(),
    "two devices": lambda devices: [device.kill() for device in devices[1:]],
    "the owner's worker": lambda devices: workers(devices[0])[0].kill(),
    "the coordinator": lambda devices: coordinator(devices).kill(),
}


def coordinator(devices: list[Device]) -> Device:
    """The device that coordinates; another one than the owner."""
    name = devices[0].coordinator()
    return next(device for device in devices if device.name == name)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_full_fine_tuning_goes_on_after_the_loss_of(
    devices: list[Device], small: Small, tmp_path: Path, fault: str
) -> None:
    events = disturbed(devices, small, tmp_path / "out", FAULTS[fault])
    check(events, full_run(small), tmp_path / "out", "model.safetensors")
    assert replans(events)
    wait_for_no_workers(*(d for d in devices if d.process and d.process.poll() is None))
