"""A daemon stays light, and a worker needs neither torch nor transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree as ET

import psutil
import pytest

from tests import reference
from tests.e2e.devices import Device, met, pair, swarm, wait_until
from tests.e2e.small_models import make_small

IDLE_BYTES = 64 * 1024 * 1024
IDLE_SECONDS = 10.0
HEAVY = re.compile(r"/(libtorch|onnxruntime|transformers|numpy|tokenizers)[^/]*(\.so|/)")


def mapped_libraries(pid: int) -> str:
    """The files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
def test_idle_daemon_is_small(tmp_path: Path) -> None:
    with swarm(tmp_path, 3) as devices:
        daemon = psutil.Process(devices[0].pid)
        wait_until(
            lambda: psutil.time.time() - daemon.create_time() > IDLE_SECONDS,  # type: ignore[attr-defined]
            IDLE_SECONDS + 10,
            "a minute of life",
        )
        for device in devices:
            assert psutil.Process(device.pid).memory_info().rss <= IDLE_BYTES
            assert HEAVY.search(mapped_libraries(device.pid)) is None


@pytest.mark.slow
def test_workers_without_torch(tmp_path: Path) -> None:
    """Devices whose Python has neither torch nor transformers train, and generate on their own."""
    light = make_light_environment(tmp_path / "light")
    devices = [
        Device(tmp_path / "laptop", "laptop"),
        Device(tmp_path / "phone", "phone", python=light),
        Device(tmp_path / "board", "board", python=light),
    ]
    small = make_small("llama", tmp_path / "llama")
    pair(devices)
    try:
        devices[0].start()
        address = devices[0].json("status")["address"]
        for device in devices[1:]:
            device.options += ["--peer", address]
            device.start()
        wait_until(lambda: met(devices), 30, "all three meet")
        # the owner has no torch either: the laptop compiles, phone and board compute
        events = devices[1].events(
            "train", str(small.folder), "--data", str(small.text), "--output",
            str(tmp_path / "out"), "--steps", "3", "--batch-size", "4", "--no-shuffle",
            "--microbatches", "2", "--sequence-length", "64", "--warmup-steps", "0",
            "--devices", "phone,board",
        )  # fmt: skip
        assert events[-1]["event"] == "done", events[-1]
        losses = [event["loss"] for event in events if event["event"] == "step"]
        run = reference.train(
            reference.load(small.folder),
            reference.blocks_of(small.folder, [small.text], 64),
            steps=3, batch_size=4, learning_rate=2e-5,
        )  # fmt: skip
        assert losses == pytest.approx(run.losses, rel=1e-4)
        picture = tmp_path / "step.svg"
        devices[1].json("jobs", "show", events[-1]["job"], "--timeline", str(picture))
        drawn = "".join(ET.fromstring(picture.read_text()).itertext())
        assert "predicted" in drawn
        assert "measured" in drawn
        seconds = events[-1]["step_seconds"]
        assert seconds["predicted"] > 0
        assert seconds["measured"] > 0
        # nobody has a compiler any more, and nobody needs one to generate
        devices[0].stop()
        answer = devices[2].json(
            "generate", str(small.folder), "--prompt", small.prompt, "--max-new-tokens", "16",
            "--devices", "phone,board",
        )  # fmt: skip
        ids = small.encode(small.prompt)
        assert answer["tokens"] == reference.greedy(reference.load(small.folder), ids, 16)
        assert {stage["name"] for stage in answer["stages"]} == {"phone", "board"}
    finally:
        for device in devices:
            if device.process is not None and device.process.poll() is None:
                device.stop()


def make_light_environment(folder: Path) -> str:
    """A virtual environment with the base dependencies only; its Python."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    root = Path(__file__).resolve().parents[2]
    pip = (sys.executable, "-m", "pip", "--python", python)
    subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", str(root)],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    for module in ("torch", "transformers"):
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
        assert done.returncode != 0
    return python
