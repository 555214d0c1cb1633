"""Two hundred times the daemon that owns a job is killed while it writes a checkpoint.

Run from the project's folder: `python -m benchmarks.kills`. Two devices train a small model in
full; a checkpoint is under way nearly always. The owner's daemon is killed with SIGKILL at a
random moment, every second time a few milliseconds after a checkpoint has begun to be written,
and started again. It must find a checkpoint that is whole, of no step before the last one that
was said to be kept, go on from there, and have every loss and weight of a run that nothing
happened to. `--quick`: ten kills.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.fleet import make_model, make_text
from benchmarks.report import Claim, parser, report
from tests.e2e.devices import Device, swarm, wait_until

KILLS, QUICK_KILLS = 200, 10
STEPS_A_KILL = 14  # more than are done between two
SECONDS, MOST_WAIT_SECONDS = 120.0, 0.5
WRITING_SECONDS = 0.03  # a checkpoint is written about as long


@dataclass
class Seen:
    """What came of the kills."""

    while_writing: int = 0
    lost: list[str] = field(default_factory=list)


class Killing:
    """One job, killed and resumed again and again."""

    def __init__(self, folder: Path, owner: Device, kills: int, seed: int) -> None:
        self._folder, self._owner, self._kills = folder, owner, kills
        self._model = make_model(folder / "model", 128, 352, 4)
        self._text = make_text(folder / "text.txt", 20_000)
        self._chance = random.Random(seed)  # noqa: S311 - nothing secret
        self.seen = Seen()

    def start(self, output: str) -> str:
        """The id of the job."""
        answer = self._owner.json(
            "train", str(self._model), "--data", str(self._text), "--output",
            str(self._folder / output), "--steps", str(STEPS_A_KILL * self._kills),
            "--batch-size", "2", "--microbatches", "1", "--sequence-length", "32",
            "--learning-rate", "1e-3", "--devices", "anna,ben", "--detach",
        )  # fmt: skip
        return str(answer["job"])

    def wait_for(self, job: str) -> dict[str, Any]:
        """Its record in the end."""
        found: dict[str, Any] = wait_until(
            lambda: (r := self._record(job))["state"] in ("done", "failed") and r,
            SECONDS + self._kills * STEPS_A_KILL, "the end",
        )  # fmt: skip
        return found

    def kill(self, job: str) -> None:
        """All the kills, each after the job has gone on."""
        for _ in range(self._kills):
            before = self._going_on(job)
            self._wait(job)
            self._owner.kill()
            self._owner.start()
            self._look(job, before["committed"])

    def losses(self, job: str) -> dict[int, float]:
        """By step: what was said last, after everything said before was the same."""
        found: dict[int, float] = {}
        for event in self._events(job):
            if event["event"] == "step":
                step, loss = event["step"], event["loss"]
                if found.setdefault(step, loss) != loss:
                    self.seen.lost.append(f"step {step} had the loss {found[step]}, then {loss}")
        return found

    def off(self) -> float:
        """How far the weights of the two runs are apart, at most, in their scale."""
        quiet, found = (
            load_file(self._folder / name / "model.safetensors") for name in ("quiet", "killed")
        )
        return max(
            float((tensor - found[name]).abs().max() / tensor.abs().max().clamp(min=1e-9))
            for name, tensor in quiet.items()
        )

    def _going_on(self, job: str) -> dict[str, Any]:
        """The record of the job when it has done a step in this run of the daemon."""
        began = self._record(job)["step"]
        found: dict[str, Any] = wait_until(
            lambda: (r := self._record(job))["state"] == "running" and r["step"] > began and r,
            SECONDS, f"step {began + 1}",
        )  # fmt: skip
        return found

    def _wait(self, job: str) -> None:
        """A while, or until a checkpoint is being written and then less of a while."""
        if self._chance.random() < 0.5:
            time.sleep(self._chance.uniform(0, MOST_WAIT_SECONDS))
            return
        checkpoints = self._owner.home / "jobs" / job / "checkpoints"
        end = time.monotonic() + MOST_WAIT_SECONDS
        while time.monotonic() < end:
            if any(checkpoints.glob(".*.new")):
                self.seen.while_writing += 1
                time.sleep(self._chance.uniform(0, WRITING_SECONDS))
                return

    def _look(self, job: str, committed: int) -> None:
        """Where it went on."""
        record = wait_until(
            lambda: (r := self._record(job))["state"] != "recovering" and r, SECONDS, "a new start"
        )
        if record["state"] == "failed":
            raise RuntimeError(record["message"])
        last = [event for event in self._events(job) if event["event"] == "replan"][-1]
        if last["resumed_from_step"] < committed:
            self.seen.lost.append(f"{committed} was kept, {last['resumed_from_step']} was found")

    def _record(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self._owner.ask(f"/v1/jobs/{job}")
        return found

    def _events(self, job: str) -> list[dict[str, Any]]:
        lines = (self._owner.home / "jobs" / job / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


def claims(kills: int, seed: int) -> Iterator[Claim]:
    """Of one job."""
    with tempfile.TemporaryDirectory() as made, swarm(Path(made) / "swarm", 2) as (owner, _):
        killing = Killing(Path(made), owner, kills, seed)
        quiet = killing.start("quiet")
        killing.wait_for(quiet)
        job = killing.start("killed")
        killing.kill(job)
        end = killing.wait_for(job)
        print(end, file=sys.stderr)
        wanted, found = killing.losses(quiet), killing.losses(job)
        seen = killing.seen
        detail = f"of {kills}, {seen.while_writing} while a checkpoint was being written"
        yield Claim("restarts that lost something", float(len(seen.lost)), 0.0, "", detail)
        other = sum(wanted[step] != loss for step, loss in found.items() if step in wanted)
        yield Claim(
            "losses that are another", float(other), 0.0, "steps",
            f"of {len(found.keys() & wanted.keys())} that both runs still tell of",
        )  # fmt: skip
        yield Claim("weights differ by", killing.off(), 0.0, "relative")
        left = list((owner.home / "jobs").rglob("checkpoints"))
        yield Claim("checkpoints left behind", float(len(left)), 0.0, "")


if __name__ == "__main__":
    parsing = parser(__doc__.splitlines()[0])
    parsing.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    given = parsing.parse_args()
    sys.exit(report(claims(QUICK_KILLS if given.quick else KILLS, given.seed), as_json=given.json))
