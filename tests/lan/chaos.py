"""Devices of which one breaks every ten seconds, while three of them train and one generates."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from tests.e2e.devices import Device, met, wait_until
from tests.e2e.test_jobs import workers
from tests.lan.namespaces import Lan

NAMES = ("anna", "ben", "cleo", "dora", "emil", "fred")
GENERATOR = "dora"  # nothing happens to it itself
NEVER_KILLED = ("anna", GENERATOR)
FAULT_SECONDS, AWAY_SECONDS, SECONDS = 10.0, 6.0, 300.0
LEAVINGS_SECONDS, IDLE_SECONDS = 60.0, 5.0
TOLERANCE = 1e-4  # relative, for weights
ENDS = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Training:
    """A job that its owner runs again and again, and the file it leaves."""

    owner: str
    method: str
    seed: int
    file: str


TRAININGS = (
    Training("anna", "lora", 1, "adapter_model.safetensors"),
    Training("ben", "full", 2, "model.safetensors"),
    Training("cleo", "lora", 3, "adapter_model.safetensors"),
)


@dataclass
class Result:
    """Of a time of chaos. `wrong` are sentences about what did not end as on a quiet day."""

    faults: list[str] = field(default_factory=list)
    trained: int = 0
    texts: int = 0
    epochs: int = 0  # of all jobs: how often one was cut short
    farthest_off: float = 0.0  # any trained weight, in the scale of its tensor
    wrong: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    grown_bytes: dict[str, int] = field(default_factory=dict)  # of daemons that were never killed
    more_files: dict[str, int] = field(default_factory=dict)  # that they hold open


class Chaos:
    """`run` does everything; jobs have so many steps of `text`, texts so many tokens."""

    def __init__(
        self,
        folder: Path,
        lan: Lan,
        devices: Sequence[Device],
        model: Path,
        text: Path,
        steps: int,
        tokens: int,
    ) -> None:
        self._folder, self._lan, self._model, self._text = folder, lan, model, text
        self._devices = {device.name: device for device in devices}
        self._steps, self._most_tokens = steps, tokens
        self._going = threading.Event()
        self._quiet: dict[str, dict[str, Any]] = {}
        self._tokens: list[int] = []
        self.result = Result()

    def run(self, seconds: float, seed: int) -> Result:
        """What must come out on a quiet day, and then for so long what comes out otherwise."""
        with ThreadPoolExecutor(len(TRAININGS)) as threads:
            for training, weights in zip(
                TRAININGS, threads.map(self._train_quietly, TRAININGS), strict=True
            ):
                self._quiet[training.owner] = weights
        self._tokens = self._generate()["tokens"]
        before = {name: self._process(name) for name in NEVER_KILLED}
        sizes = {name: _sizes(process) for name, process in before.items()}
        self._going.set()
        with ThreadPoolExecutor(len(TRAININGS) + 1) as threads:
            work = [threads.submit(self._train_on, training) for training in TRAININGS]
            work.append(threads.submit(self._generate_on))
            try:
                self._break_things(random.Random(seed), seconds)
            finally:
                self._going.clear()
            for one in work:
                one.result()
        wait_until(lambda: met(list(self._devices.values())), SECONDS, "all alive")
        self._look_for_leavings()
        for name, process in before.items():
            memory, files = _sizes(process)
            self.result.grown_bytes[name] = memory - sizes[name][0]
            self.result.more_files[name] = files - sizes[name][1]
        return self.result

    def _process(self, name: str) -> psutil.Process:
        return psutil.Process(self._devices[name].pid)

    def _train_quietly(self, training: Training) -> dict[str, Any]:
        output = self._folder / f"quiet-{training.owner}"
        end = self._end(training, self._started(training, output))
        assert end["state"] == "done", end
        return load_file(output / training.file)

    def _train_on(self, training: Training) -> None:
        """Job after job."""
        while self._going.is_set():
            output = self._folder / f"chaos-{training.owner}"
            end = self._end(training, self._started(training, output))
            self.result.epochs += end["epoch"]
            self.result.trained += 1
            if end["state"] != "done":
                self.result.wrong.append(f"a job of {training.owner}: {end}")
            else:
                off = self._off(training, output)
                self.result.farthest_off = max(off, self.result.farthest_off)
                if off > TOLERANCE:
                    self.result.wrong.append(f"weights of {training.owner} differ by {off:.3g}")
            shutil.rmtree(output, ignore_errors=True)

    def _started(self, training: Training, output: Path) -> str:
        """The id of a new job. Its owner may be away, or go before it says so."""
        owner = self._devices[training.owner]
        known = {job["id"] for job in self._jobs(owner)}
        arguments = (
            "train", str(self._model), "--data", str(self._text), "--output", str(output),
            "--method", training.method, "--seed", str(training.seed),
            "--steps", str(self._steps), "--batch-size", "4", "--microbatches", "2",
            "--sequence-length", "64", "--learning-rate", "3e-4", "--detach", "--json",
        )  # fmt: skip

        def start() -> str | None:
            for job in self._jobs(owner):
                if job["output"] == str(output) and job["id"] not in known:
                    return str(job["id"])
            done = owner.cli(*arguments)
            return json.loads(done.stdout)["job"] if done.returncode == 0 else None

        return str(wait_until(start, SECONDS, f"a job of {training.owner} to begin"))

    def _jobs(self, owner: Device) -> list[dict[str, Any]]:
        found = wait_until(lambda: _asked(owner, "/v1/jobs"), SECONDS, f"{owner.name} to answer")
        jobs: list[dict[str, Any]] = found["jobs"]
        return jobs

    def _end(self, training: Training, job: str) -> dict[str, Any]:
        """The record of a job that has ended."""
        owner = self._devices[training.owner]

        def ended() -> dict[str, Any] | None:
            time.sleep(0.2)  # of a job that takes many seconds
            found = _asked(owner, f"/v1/jobs/{job}")
            return found if found and found["state"] in ENDS else None

        record: dict[str, Any] = wait_until(ended, SECONDS, f"the end of {owner.name}'s job {job}")
        return record

    def _off(self, training: Training, output: Path) -> float:
        """How far weights are from those of the quiet day, at most, in their scale."""
        quiet, found = self._quiet[training.owner], load_file(output / training.file)
        assert found.keys() == quiet.keys()
        return max(
            float((tensor - found[name]).abs().max() / tensor.abs().max().clamp(min=1e-9))
            for name, tensor in quiet.items()
        )

    def _generate_on(self) -> None:
        """Text after text."""
        while self._going.is_set():
            answer = self._generate()
            self.result.texts += 1
            if answer.get("tokens") != self._tokens:
                self.result.wrong.append(f"a text: {answer}")

    def _generate(self) -> dict[str, Any]:
        done = self._devices[GENERATOR].cli(
            "generate",
            str(self._model),
            "--prompt",
            "Once",
            "--max-new-tokens",
            str(self._most_tokens),
            "--json",
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _break_things(self, chance: random.Random, seconds: float) -> None:
        """One after the other; each device is back before the next one breaks."""
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            name = chance.choice([name for name in NAMES if name != GENERATOR])
            kinds = ("worker", "cut") if name in NEVER_KILLED else ("worker", "cut", "kill", "stop")
            kind = chance.choice(kinds)
            self.result.faults.append(f"{kind} {name}")
            self._break(kind, name)
            time.sleep(max(0.0, FAULT_SECONDS - (time.monotonic() - began)))

    def _break(self, kind: str, name: str) -> None:
        device, host = self._devices[name], self._lan.hosts[NAMES.index(name)]
        match kind:
            case "worker":
                for worker in workers(device)[:1]:
                    with contextlib.suppress(psutil.NoSuchProcess):  # its job ends just now
                        worker.kill()
            case "cut":
                self._lan.cut(host)
                time.sleep(AWAY_SECONDS)
                self._lan.heal(host)
            case _:
                (device.kill if kind == "kill" else device.stop)()
                time.sleep(AWAY_SECONDS / 2)
                device.start()

    def _look_for_leavings(self) -> None:
        """They may take a moment to go."""
        end = time.monotonic() + LEAVINGS_SECONDS
        while (found := self._leavings()) and time.monotonic() < end:
            time.sleep(0.5)
        self.result.left_behind = found

    def _files(self, home: Path) -> list[Path]:
        """Of jobs that are over; none while a daemon is at work on them."""
        patterns = ("checkpoints", "tokens.bin", "trained-*", "turns")
        jobs = home / "jobs"
        try:
            found = [path for pattern in patterns for path in jobs.rglob(pattern)]
        except FileNotFoundError:  # removed meanwhile
            return [jobs]
        return [*(home / "store" / "passing").iterdir(), *found]

    def _leavings(self) -> list[str]:
        """What should not be there when nothing runs."""
        found: list[str] = []
        for device in self._devices.values():
            found += [f"worker {worker.pid} of {device.name}" for worker in workers(device)]
            found += [str(path.relative_to(self._folder)) for path in self._files(device.home)]
            if device.ask("/v1/status")["memory"]["granted_bytes"]:
                found.append(f"memory granted on {device.name}")
        return [*found, *(path.name for path in self._folder.glob(".*"))]


def _sizes(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes and open files of a daemon that has nothing to do: the least in a while."""
    memory, files = [], []
    for _ in range(10):
        time.sleep(IDLE_SECONDS / 10)
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
    return min(memory), min(files)


def _asked(device: Device, path: str) -> dict[str, Any] | None:
    """What a daemon answers, or nothing while it is away."""
    try:
        found: dict[str, Any] = device.ask(path)
    except (OSError, AssertionError, ValueError):
        return None
    return found
