"""Half an hour in which something breaks every ten seconds: all ends right, nothing is left behind.

Run from the project's folder, as root: `python -m benchmarks.chaos`. Six devices are daemons in
network namespaces. Three of them own a training job each (two adapters, one full fine-tuning), a
fourth one generates the same text again and again. Every ten seconds a worker is killed, a device
is killed, stopped in good order or cut off, and comes back some seconds later; owners, too. What
the jobs leave is compared with what they leave on a quiet day. `--quick`: one minute of it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from benchmarks.fleet import make_model, make_text
from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device, met, running, wait_until
from tests.e2e.test_jobs import workers
from tests.lan.namespaces import Host, Lan

NAMES = ("anna", "ben", "cleo", "dora", "emil", "fred")
MINUTES, QUICK_MINUTES = 30.0, 1.0
FAULT_SECONDS, AWAY_SECONDS, SECONDS = 10.0, 6.0, 900.0
WEIGHTS_REACH, GROWN_REACH = 1e-4, 5.0  # relative, MB
STEPS_A_MINUTE = 60  # of each job; three run beside each other
GENERATOR = 3


@dataclass(frozen=True)
class Training:
    """A job and what it leaves."""

    owner: int
    method: str
    seed: int

    @property
    def file(self) -> str:
        """With its weights."""
        return "adapter_model.safetensors" if self.method == "lora" else "model.safetensors"


JOBS = (Training(0, "lora", 1), Training(1, "full", 2), Training(2, "lora", 3))


class Scene:
    """The devices, their jobs, and what goes wrong."""

    def __init__(self, folder: Path, lan: Lan, devices: list[Device], minutes: float) -> None:
        self.folder, self.lan, self.devices = folder, lan, devices
        self.model = make_model(folder / "model", 192, 512, 8)
        self.text = make_text(folder / "text.txt", 20_000)
        self.steps = max(30, round(minutes * STEPS_A_MINUTE))
        self.said: list[str] = []

    def train(self, job: Training, output: Path) -> str:
        """Start a job; its id."""
        owner = self.devices[job.owner]
        answer = owner.json(
            "train", str(self.model), "--data", str(self.text), "--output", str(output),
            "--method", job.method, "--seed", str(job.seed), "--steps", str(self.steps),
            "--batch-size", "4", "--microbatches", "2", "--sequence-length", "64",
            "--learning-rate", "3e-4", "--detach",
        )  # fmt: skip
        return str(answer["job"])

    def state(self, job: Training, number: str) -> dict[str, Any]:
        """Of a job; nothing while its owner is away."""
        done = self.devices[job.owner].cli("jobs", "show", number, "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {"state": "away"}

    def wait_for(self, job: Training, number: str) -> dict[str, Any]:
        """The end of a job."""
        ends = ("done", "failed", "cancelled")
        return wait_until(
            lambda: (found := self.state(job, number))["state"] in ends and found,
            SECONDS, f"the job of {NAMES[job.owner]}",
        )  # fmt: skip

    def generate(self) -> list[int]:
        """The same text over all devices that are there."""
        done = self.devices[GENERATOR].cli(
            "generate", str(self.model), "--prompt", "Once", "--max-new-tokens", "60", "--json"
        )
        answer = json.loads(done.stdout)
        return list(answer.get("tokens") or [-1, answer])

    def faults(self, chance: random.Random, seconds: float) -> None:
        """One after the other; at the end everybody is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            index = chance.choice([i for i in range(len(NAMES)) if i != GENERATOR])
            device, host = self.devices[index], self.lan.hosts[index]
            kind = chance.choice(("worker", "kill", "stop", "cut"))
            self.said.append(f"{kind} {device.name}")
            began = time.monotonic()
            self._fault(kind, device, host)
            time.sleep(max(0.0, FAULT_SECONDS - (time.monotonic() - began)))
        wait_until(lambda: met(self.devices), SECONDS, "all alive")

    def _fault(self, kind: str, device: Device, host: Host) -> None:
        match kind:
            case "worker":
                for worker in workers(device)[:1]:
                    worker.kill()
            case "cut":
                self.lan.cut(host)
                time.sleep(AWAY_SECONDS)
                self.lan.heal(host)
            case _:
                (device.kill if kind == "kill" else device.stop)()
                time.sleep(AWAY_SECONDS / 2)
                device.start()

    def left_behind(self) -> list[str]:
        """What should not be there when nothing runs."""
        found = [f"worker of {d.name}" for d in self.devices if workers(d)]
        for device in self.devices:
            rests = [
                *(device.home / "store" / "passing").iterdir(),
                *(device.home / "jobs").rglob("checkpoints"),
                *(device.home / "jobs").rglob("tokens.bin"),
                *(device.home / "jobs").rglob("*.state"),
            ]
            found += [str(path.relative_to(self.folder)) for path in rests]
            if device.json("status")["memory"]["granted_bytes"]:
                found.append(f"memory granted on {device.name}")
        return found

    def off(self, job: Training) -> float:
        """How far the weights are from those of the quiet day, in their scale."""
        ways = (self.folder / f"{way}-{job.owner}" / job.file for way in ("quiet", "chaos"))
        quiet, chaos = (load_file(path) for path in ways)
        return max(
            float((tensor - chaos[name]).abs().max() / tensor.abs().max().clamp(min=1e-9))
            for name, tensor in quiet.items()
        )


def claims(minutes: float) -> Iterator[Claim]:
    """Of one run."""
    with tempfile.TemporaryDirectory() as made, Lan(len(NAMES)) as lan:
        folder = Path(made)
        devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(NAMES, lan.hosts, strict=True)
        ]
        with running(devices):
            scene = Scene(folder, lan, devices, minutes)
            for job in JOBS:
                scene.wait_for(job, scene.train(job, folder / f"quiet-{job.owner}"))
            tokens = scene.generate()
            generator = psutil.Process(devices[GENERATOR].pid)
            before = generator.memory_info().rss
            numbers = [scene.train(job, folder / f"chaos-{job.owner}") for job in JOBS]
            seed = int(time.time())
            chance = random.Random(seed)  # noqa: S311 - nothing secret
            chaos = threading.Thread(target=scene.faults, args=(chance, 60 * minutes))
            chaos.start()
            texts: list[list[int]] = []
            while chaos.is_alive():
                texts.append(scene.generate())
            chaos.join()
            ends = [scene.wait_for(job, n) for job, n in zip(JOBS, numbers, strict=True)]
            yield Claim(
                "jobs that ended right", float(sum(e["state"] == "done" for e in ends)),
                float(len(JOBS)), "jobs", f"{len(scene.said)} faults, seed {seed}: "
                + ", ".join(f"{e['owner']} {e['state']} in epoch {e['epoch']}" for e in ends),
                at_most=False,
            )  # fmt: skip
            wrong = sum(text != tokens for text in texts)
            print(*(text for text in texts if text != tokens), sep="\n", file=sys.stderr)
            detail = f"of {len(texts)}"
            yield Claim("texts that are another", float(wrong), 0.0, "texts", detail)
            for job, end in zip(JOBS, ends, strict=True):
                if end["state"] == "done":
                    name = f"{job.method} of {NAMES[job.owner]}, weights differ by"
                    yield Claim(name, scene.off(job), WEIGHTS_REACH, "relative")
                else:
                    print(end, file=sys.stderr)
            wait_until(lambda: not scene.left_behind(), 60.0, str(scene.left_behind()))
            yield Claim("left behind", float(len(scene.left_behind())), 0.0, "things")
            grown = (generator.memory_info().rss - before) / 1e6
            yield Claim("memory of the daemon that was never killed", grown, GROWN_REACH, "MB more")


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    sys.exit(report(claims(QUICK_MINUTES if given.quick else MINUTES), as_json=given.json))
