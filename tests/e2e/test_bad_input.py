"""Bad input gives one clear line and exit status 1, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.devices import Device, running, swarm, wait_until
from tests.e2e.small_models import TEXT, copy_model, make_small

CONFLICT_SECONDS = 30.0
BATTERY_SECONDS = 30.0


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """One daemon alone."""
    with swarm(tmp_path_factory.mktemp("alone"), 1) as found:
        yield found[0]


@pytest.fixture
def model(tmp_path: Path, llama: Path) -> Path:
    """A copy of the small Llama that a test may spoil."""
    return copy_model(llama, tmp_path / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama."""
    return make_small("llama", tmp_path_factory.mktemp("llama")).folder


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed command printed."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def refused(
    device: Device, model: Path, *options: str, data: Path = TEXT, output: Path | None = None
) -> str:
    """Train in a way that must fail; the line, after checking that nothing was written."""
    out = output or model.parent / "out"
    before = set(out.parent.iterdir())
    line = one_line(
        device.cli(
            "train", str(model), "--data", str(data), "--output", str(out), "--steps", "2", *options
        )
    )
    assert set(out.parent.iterdir()) == before
    return line


def edit_config(model: Path, **changes: object) -> None:
    """Change keys of a model's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_no_such_model(device: Device, tmp_path: Path) -> None:
    assert "nowhere" in refused(device, tmp_path / "nowhere")


def test_unsupported_architecture_names_the_supported_ones(device: Device, model: Path) -> None:
    edit_config(model, model_type="mamba", architectures=["MambaForCausalLM"])
    line = refused(device, model)
    assert "mamba" in line
    assert "llama" in line
    assert "gpt2" in line


def test_truncated_weights(device: Device, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(device, model)


def test_corrupt_header(device: Device, model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8:40] = b"\xff" * 32
    weights.write_bytes(data)
    assert "model.safetensors" in refused(device, model)


def test_missing_tensor(device: Device, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert name in refused(device, model)


def test_empty_data(device: Device, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "empty.txt"
    data.write_text("")
    assert "empty" in refused(device, model, data=data)


def test_data_that_is_not_utf8(device: Device, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "latin.txt"
    data.write_bytes("caf\xe9 ".encode("latin-1") * 100)
    assert "UTF-8" in refused(device, model, data=data)


def test_data_that_is_not_there(device: Device, model: Path, tmp_path: Path) -> None:
    assert "gone.txt" in refused(device, model, data=tmp_path / "gone.txt")


def test_sequence_longer_than_the_model_allows(device: Device, model: Path) -> None:
    line = refused(device, model, "--sequence-length", "257")
    assert "257" in line
    assert "256" in line


def test_prompt_longer_than_the_model_allows(device: Device, model: Path) -> None:
    line = one_line(device.cli("generate", str(model), "--prompt", "word " * 80))
    assert "256" in line


def test_batch_not_divisible_by_microbatches(device: Device, model: Path) -> None:
    line = refused(device, model, "--batch-size", "6", "--microbatches", "4")
    assert "6" in line
    assert "4" in line


def test_output_that_is_not_empty(device: Device, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    assert "not empty" in refused(device, model, output=out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_model_that_does_not_fit(tmp_path: Path, model: Path) -> None:
    with swarm(tmp_path / "small", 2, "--memory", "40M") as devices:
        line = refused(devices[0], model)
    assert "anna" in line
    assert "ben" in line
    assert "MB" in line


def test_a_device_that_is_low_on_charge(tmp_path: Path, model: Path) -> None:
    """Its battery is read by a command, as that of a UPS is."""
    battery = tmp_path / "battery"
    battery.write_text(
        "#!/bin/sh\n"
        """echo '{"percentage": 12, "plugged": "UNPLUGGED", "temperature": 31.5}'\n"""
    )
    battery.chmod(0o755)
    settings = {"CONFIDANT_BATTERY_COMMAND": str(battery)}
    anna, ben = Device(tmp_path / "a", "anna"), Device(tmp_path / "b", "ben", settings=settings)
    with running([anna, ben]):
        wait_until(lambda: seen(anna, "ben")["refuses"], BATTERY_SECONDS, "the battery is read")
        found = seen(anna, "ben")
        assert found["power"] == {"charging": False, "percent": 12.0}
        assert found["temperature_celsius"] >= 31.5
        low = "its battery is at 12 % (least_battery_percent = 20)"
        (left,) = anna.json("plan", str(model))["left_out"]
        assert (left["name"], left["reason"]) == ("ben", low)
        line = refused(anna, model, "--devices", "anna,ben")
        assert f"ben takes no part now: {low}" in line
        checks = {check["name"]: check for check in ben.json("doctor")["checks"]}
        assert checks["work for others"]["state"] == "warn"
        stages = ben.json("plan", str(model), "--devices", "anna,ben")["stages"]
        assert {stage["name"] for stage in stages} == {"anna", "ben"}  # its own job


def seen(device: Device, name: str) -> dict[str, Any]:
    """What a device says of a peer."""
    return next(p for p in device.json("peers")["peers"] if p["name"] == name)


def test_no_compiler(tmp_path: Path, model: Path) -> None:
    # A finder that hides torch makes this device one without the compiler extra.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'onnxscript', 'transformers'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    device = Device(tmp_path / "phone", "phone", prefix=("env", f"PYTHONPATH={hidden}"))
    device.start()
    try:
        assert "compiler" in refused(device, model)
    finally:
        device.stop()


def test_daemon_not_running(tmp_path: Path) -> None:
    line = one_line(Device(tmp_path / "home", "nobody").cli("status"))
    assert "confidantd" in line


def test_daemon_not_running_as_json(tmp_path: Path) -> None:
    done = Device(tmp_path / "home", "nobody").cli("status", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "daemon-not-running"


def test_second_daemon_on_one_home(device: Device) -> None:
    second = subprocess.run(
        device.command(), capture_output=True, text=True, timeout=30,
        env=device.environment(), check=False,
    )  # fmt: skip
    assert "already" in one_line(second)
    assert device.json("status")["device"]["name"] == device.name


def test_port_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        device = Device(tmp_path / "home", "late", "--port", str(port))
        done = subprocess.run(
            device.command(), capture_output=True, text=True, timeout=30,
            env=device.environment(), check=False,
        )  # fmt: skip
    assert str(port) in one_line(done)


def test_copied_home_is_said_by_both(tmp_path: Path, model: Path) -> None:
    with swarm(tmp_path / "swarm", 1) as (first,):
        copy = Device(
            tmp_path / "swarm" / "copy", "copy", "--peer", first.json("status")["address"]
        )
        shutil.copytree(
            first.home, copy.home, ignore=shutil.ignore_patterns("control.sock", "port*", "*.lock")
        )
        copy.start()
        try:
            for device in (first, copy):
                said = wait_until(
                    lambda d=device: d.json("status")["conflict"], CONFLICT_SECONDS, "conflict"
                )
                assert "identity" in said
                assert "identity" in refused(device, model)
                assert "identity" in device.log.read_text()
        finally:
            copy.stop()


def test_output_folder_that_cannot_be_written(device: Device, model: Path) -> None:
    assert "/proc" in one_line(
        device.cli(
            "train", str(model), "--data", str(TEXT), "--output", "/proc/out", "--steps", "2"
        )
    )


def test_unknown_device(device: Device, model: Path) -> None:
    assert "nobody" in refused(device, model, "--devices", "nobody")


def test_usage_errors_have_status_two(device: Device) -> None:
    assert device.cli("train").returncode == 2
    assert device.cli("no-such-command").returncode == 2


def test_unreadable_home(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    device = Device(blocked / "home", "nobody")
    done = subprocess.run(
        device.command(), capture_output=True, text=True, timeout=30,
        env={**os.environ, **device.environment()}, check=False,
    )  # fmt: skip
    assert "home" in one_line(done)
