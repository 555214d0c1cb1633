"""How soon training goes on after a loss, and what it loses: nothing.

Run from the project's folder, as root: `python -m benchmarks.recovery`. Four devices are daemons
in network namespaces with links of 50 Mbit/s. A job is run undisturbed; then again and again, and
each time something is lost in the middle of it: a worker, a device, the coordinator, two devices
at once, a cable for ten seconds; and a device that is stopped in good order. LoRA on a model of
134M parameters; full fine-tuning on one of 10M, whose state a link of 50 Mbit/s carries in time.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.fleet import NAMES, make_model, make_text
from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device, met, running, wait_until
from tests.e2e.test_jobs import workers
from tests.lan.namespaces import Lan
from tests.reference import MODELS

MBIT, DEVICES = 50.0, 4
CUT_SECONDS = 10.0
DETECT_REACH, AGAIN_REACH, STANDSTILL_REACH, WEIGHTS_REACH = 2.0, 5.0, 2.0, 1e-4
PAUSE_REACH = 3.0
MEET_SECONDS, SPARES_SECONDS, QUIET_SECONDS = 60.0, 400.0, 20.0


@dataclass(frozen=True)
class Shape:
    """A model and a job on it."""

    method: str
    model: tuple[int, int, int, int]  # hidden, MLP columns, layers, vocabulary
    steps: int
    sequences: int
    length: int
    fault_after: int


SHAPES = (
    Shape("lora", (768, 2048, 12, 32_000), 16, 4, 64, 6),
    Shape("full", (384, 1056, 6, 300), 60, 8, 128, 20),
)
QUICK = (Shape("lora", (256, 704, 4, 300), 40, 8, 64, 10),)


@dataclass
class Job:
    """A run of a job: when what was heard of it."""

    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def first(self, name: str, after: float, **wanted: object) -> float | None:
        """When an event was heard first after a moment."""
        for at, event in self.events:
            right = all(event.get(key) == value for key, value in wanted.items())
            if at >= after and event["event"] == name and right:
                return at
        return None

    def steps_done(self, before: float) -> int:
        """By a moment."""
        done = [e["step"] for at, e in self.events if e["event"] == "step" and at < before]
        return max(done, default=0)

    def step_seconds(self, before: float) -> float:
        """The longest step before a moment, but for the first."""
        times = [at for at, e in self.events if e["event"] == "step" and at < before]
        return max(b - a for a, b in itertools.pairwise(times[1:]))


class Fleet:
    """The devices, and what can be done to them."""

    def __init__(self, lan: Lan, devices: list[Device]) -> None:
        self.lan, self.devices = lan, devices

    @property
    def owner(self) -> Device:
        """Who has model and text."""
        return self.devices[0]

    def all_there(self) -> None:
        """Start what was killed; another device than the owner coordinates."""
        for device in self.devices:
            if device.process is None or device.process.poll() is not None:
                device.start()
        wait_until(lambda: met(self.devices), MEET_SECONDS, "all alive")
        if self.owner.coordinator() == self.owner.name:
            self.owner.stop()
            self.owner.start()
            wait_until(lambda: met(self.devices), MEET_SECONDS, "all alive")

    def kill_worker(self) -> None:
        """Of the second stage."""
        workers(self.devices[1])[0].kill()

    def kill_device(self) -> None:
        """Its daemon, and with it its worker."""
        self.devices[2].kill()

    def kill_coordinator(self) -> None:
        """Whoever that is."""
        name = self.owner.coordinator()
        next(device for device in self.devices if device.name == name).kill()

    def kill_two(self) -> None:
        """Two neighbours."""
        for device in self.devices[2:]:
            assert device.process is not None
            device.process.kill()
        for device in self.devices[2:]:
            device.kill()

    def cut(self) -> None:
        """Pull a cable and put it back later."""
        self.lan.cut(self.lan.hosts[2])
        threading.Timer(CUT_SECONDS, self.lan.heal, (self.lan.hosts[2],)).start()

    def stop_device(self) -> None:
        """In good order, which takes as long as it takes."""
        threading.Thread(target=self.devices[2].stop).start()

    def stored_bytes(self) -> int:
        """In the stores of all devices."""
        blobs = (p for d in self.devices for p in (d.home / "store" / "blobs").glob("*"))
        return sum(path.stat().st_size for path in blobs if path.exists())


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """Four devices on a LAN."""
    with Lan(DEVICES, mbit=MBIT) as lan:
        devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(NAMES, lan.hosts, strict=True)
        ]
        with running(devices):
            yield Fleet(lan, devices)


class Bench:
    """Jobs of one shape on a fleet."""

    def __init__(self, folder: Path, shape: Shape, found: Fleet) -> None:
        hidden, columns, layers, vocabulary = shape.model
        self._shape, self._fleet, self._folder = shape, found, folder
        self._model = make_model(folder / "model", hidden, columns, layers, vocabulary)
        self._text = make_text(folder / "text.txt", 2 * shape.sequences * shape.length)

    def _command(self, output: Path, steps: int) -> list[str]:
        shape = self._shape
        each, rest = divmod(shape.model[2], DEVICES)
        layers = ",".join(str(each + (i < rest)) for i in range(DEVICES))
        return self._fleet.owner.cli_command(
            "train", str(self._model), "--data", str(self._text), "--output", str(output),
            "--method", shape.method, "--steps", str(steps), "--batch-size", str(shape.sequences),
            "--microbatches", "2", "--sequence-length", str(shape.length), "--learning-rate",
            "1e-3", "--devices", ",".join(NAMES), "--layers", layers, "--json",
        )  # fmt: skip

    def run(self, name: str, fault: Callable[[], None] | None = None) -> tuple[Job, float]:
        """A job to its end, and when something happened to it."""
        job, happened = Job(), 0.0
        with subprocess.Popen(  # noqa: S603 - our own command
            self._command(self._folder / name, self._shape.steps),
            stdout=subprocess.PIPE, text=True, env=self._fleet.owner.environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                job.events.append((time.monotonic(), event))
                due = event.get("checkpoint") and event["step"] >= self._shape.fault_after
                if fault is not None and due:
                    happened = time.monotonic()
                    fault()
                    fault = None
        last = job.events[-1][1]
        if last["event"] != "done":
            raise RuntimeError(f"{name}: {last}")
        return job, happened

    def lay_up_spares(self) -> None:
        """Let a job run until no device fetches anything beside it any more."""
        owner = self._fleet.owner
        command = [*self._command(self._folder / "never", 100_000), "--detach"]
        done = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, check=True, env=owner.environment()
        )
        job = json.loads(done.stdout)["job"]
        end, stored, since = time.monotonic() + SPARES_SECONDS, -1, time.monotonic()
        while time.monotonic() < end and time.monotonic() - since < QUIET_SECONDS:
            time.sleep(1.0)
            now = self._fleet.stored_bytes() if owner.json("jobs", "show", job)["step"] else -2
            if abs(now - stored) > 4_000_000 or now < 0:
                stored, since = now, time.monotonic()
        owner.json("jobs", "cancel", job)

    def off(self, name: str) -> float:
        """How far the weights are from those of the undisturbed run, at most, in their scale."""
        file = "adapter_model.safetensors" if self._shape.method == "lora" else "model.safetensors"
        found, wanted = (load_file(self._folder / run / file) for run in (name, "undisturbed"))
        return max(
            float((tensor - wanted[key]).abs().max() / wanted[key].abs().max().clamp(min=1e-9))
            for key, tensor in found.items()
        )


def generation(quick: bool) -> Iterator[Claim]:
    """A stage is killed in the middle of 256 tokens."""
    with tempfile.TemporaryDirectory() as made, fleet(Path(made)) as found:
        model = MODELS / "stories260K"
        if not model.is_dir():
            model = make_model(Path(made) / "model", 128, 352, 5)
        owner, tokens = found.owner, 128 if quick else 256
        asked = (
            "generate", str(model), "--prompt", "Once upon a time", "--max-new-tokens", str(tokens),
            "--devices", ",".join(NAMES), "--json",
        )  # fmt: skip
        undisturbed = owner.json(*asked)["tokens"]
        with subprocess.Popen(  # noqa: S603 - our own command
            owner.cli_command(*asked), stdout=subprocess.PIPE, text=True, env=owner.environment()
        ) as process:
            times = _watched(owner, found.kill_worker, tokens // 4)
            assert process.stdout is not None
            answer = json.loads(process.stdout.read())
        pause = max(b - a for a, b in itertools.pairwise(times))
        detail = f"{len(answer['tokens'])} tokens, greedy"
        yield Claim("generation, a worker: pause", pause, PAUSE_REACH, "s", detail)
        same = float(answer["tokens"] == undisturbed)
        yield Claim("generation, a worker: the same tokens", same, 1.0, "yes", at_most=False)


def _watched(owner: Device, fault: Callable[[], None], after: int) -> list[float]:
    """When each token of the job that runs was heard of; something happens after some."""
    job = wait_until(
        lambda: [j["id"] for j in owner.json("jobs")["jobs"] if j["state"] == "planning"],
        MEET_SECONDS, "the job",
    )[0]  # fmt: skip
    times: list[float] = []
    with subprocess.Popen(  # noqa: S603 - our own command
        owner.cli_command("jobs", "watch", job, "--json"), stdout=subprocess.PIPE, text=True,
        env=owner.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "token":
                times.append(time.monotonic())
                if len(times) == after:
                    fault()
    return times


def claims(shapes: tuple[Shape, ...]) -> Iterator[Claim]:
    """Of each shape and fault."""
    for shape in shapes:
        with tempfile.TemporaryDirectory() as made, fleet(Path(made)) as found:
            bench = Bench(Path(made), shape, found)
            found.all_there()
            bench.run("undisturbed")
            if shape.method == "lora":
                bench.lay_up_spares()
            faults = {
                "a worker": found.kill_worker,
                "a device": found.kill_device,
                "the coordinator": found.kill_coordinator,
                "two devices": found.kill_two,
                "a cable for 10 s": found.cut,
                "a device in good order": found.stop_device,
            }
            for name, fault in faults.items():
                found.all_there()
                job, at = bench.run(name, fault)
                yield from _judge(f"{shape.method}, {name}", shape, job, at, bench.off(name))


def _judge(name: str, shape: Shape, job: Job, at: float, off: float) -> Iterator[Claim]:
    replanned = job.first("replan", at)
    if replanned is None:
        raise RuntimeError(f"{name}: nothing was noticed")
    event = next(e for when, e in job.events if when == replanned)
    done, resumed = job.steps_done(replanned), event["resumed_from_step"]
    step = job.first("step", replanned)
    assert step is not None
    usual = job.step_seconds(at)
    if "good order" in name:
        last = max(when for when, e in job.events if e["event"] == "step" and when < replanned)
        yield Claim(
            f"{name}: standstill", max(0.0, step - last - usual), STANDSTILL_REACH, "s",
            f"a step takes {usual:.2f} s",
        )  # fmt: skip
        yield Claim(f"{name}: steps lost", float(done - resumed), 0.0, "steps")
    else:
        noticed = job.first("progress", at, phase="recover")
        assert noticed is not None
        yield Claim(f"{name}: noticed after", noticed - at, DETECT_REACH, "s", event["reason"])
        again = max(0.0, step - noticed - usual)
        detail = (
            f"stages in place after {replanned - noticed:.2f} s, a step takes {usual:.2f} s; "
            f"{done - resumed} done again"
        )
        if shape.method == "lora":
            yield Claim(f"{name}: training again after", again, AGAIN_REACH, "s more", detail)
        else:
            print(f"{name}: training again after {again:.2f} s more; {detail}", file=sys.stderr)
    yield Claim(f"{name}: weights differ by", off, WEIGHTS_REACH, "relative")


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    chosen = claims(QUICK if given.quick else SHAPES)
    sys.exit(report(itertools.chain(generation(given.quick), chosen), as_json=given.json))
