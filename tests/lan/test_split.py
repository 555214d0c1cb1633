"""A job on a LAN that falls apart and heals: it goes on where its owner is, and nowhere else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.devices import Device, met, running, wait_until
from tests.e2e.small_models import make_small
from tests.e2e.test_jobs import workers
from tests.e2e.test_recovery import check, full_run, replans
from tests.e2e.test_replanning import make_model
from tests.lan.namespaces import Lan

pytestmark = pytest.mark.lan

NAMES = ("anna", "ben", "cleo", "dora")
STEPS, SPLIT_AFTER = 60, 15
SECONDS = 40.0


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Four hosts."""
    with Lan(len(NAMES)) as found:
        yield found


@pytest.fixture
def devices(lan: Lan, tmp_path: Path) -> Iterator[list[Device]]:
    """A device on each; another one than the owner of the job coordinates."""
    found = [
        Device(tmp_path / name, name, prefix=host.prefix, host=host.address)
        for name, host in zip(NAMES, lan.hosts, strict=True)
    ]
    with running(found):
        found[0].stop()
        found[0].start()
        wait_until(lambda: met(found), SECONDS, "all met")
        yield found


def sees(device: Device) -> set[str]:
    """Names of the others that are alive."""
    return {name for name, state in device.states().items() if state == "alive"}


def test_the_job_goes_on_on_the_side_of_its_owner(
    lan: Lan, devices: list[Device], tmp_path: Path
) -> None:
    owner = devices[0]
    model = make_model(tmp_path / "model", 64, 160)
    small = replace(make_small("llama", tmp_path / "small"), folder=model)
    boss = next(device for device in devices if device.name == owner.coordinator())
    assert boss is not owner
    lost = [boss, next(d for d in devices[1:] if d is not boss)]
    others = {device.name for device in devices if device not in lost}
    command = owner.cli_command(
        "train", str(small.folder), "--data", str(small.text), "--output", str(tmp_path / "out"),
        "--steps", str(STEPS), "--batch-size", "8", "--microbatches", "4", "--sequence-length",
        str(small.length), "--learning-rate", "1e-3", "--warmup-steps", "2", "--no-shuffle",
        "--devices", ",".join(NAMES), "--layers", "2,2,2,2", "--json",
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    whole = True
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=owner.environment()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if whole and events[-1].get("checkpoint") and events[-1]["step"] >= SPLIT_AFTER:
                whole = False
                lan.split([lan.hosts[devices.index(device)] for device in lost])
            if events[-1]["event"] == "replan" and len(replans(events)) == 1:
                wait_until(lambda: sees(owner) == others - {"anna"}, SECONDS, "two sides")
                for device in lost:
                    wait_until(lambda d=device: not workers(d), SECONDS, "its stage has ended")
                wait_until(lambda: lost[1].coordinator() == boss.name, SECONDS, "a side of its own")
                assert owner.coordinator() in others
                lan.join()
    assert not whole
    check(events, full_run(small, STEPS), tmp_path / "out", "model.safetensors")
    first = next(e for e in events[events.index(replans(events)[0]) :] if e["event"] == "plan")
    assert {stage["name"] for stage in first["stages"]} == others
    wait_until(lambda: met(devices), SECONDS, "one side again")
