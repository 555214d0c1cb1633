"""Real daemons with a share of a core each, and jobs on them whose steps are timed from outside."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.control_groups import CpuQuota, quotas
from tests.e2e.devices import Device, running
from tests.e2e.small_models import TEXT, byte_tokenizer

STEP_SECONDS = 600.0
NAMES = ("anna", "ben", "cleo", "dora")


@contextlib.contextmanager
def fleet(folder: Path, shares: Sequence[float]) -> Iterator[tuple[list[Device], list[CpuQuota]]]:
    """Daemons that see each other, each with such a share of a core for all it does."""
    with quotas(*shares) as groups:
        devices = [
            Device(folder / name, name, prefix=group.prefix)
            for name, group in zip(NAMES, groups, strict=False)
        ]
        with running(devices):
            yield devices, groups


def make_model(folder: Path, hidden: int, columns: int, layers: int, vocabulary: int = 300) -> Path:
    """A random Llama with a small vocabulary, so that its blocks are what takes time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=columns,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, max_position_embeddings=512, bos_token_id=None,
        tie_word_embeddings=False, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def make_text(path: Path, characters: int) -> Path:
    """Text of at least so many characters, a token each."""
    text = TEXT.read_text()
    path.write_text(text * (characters // len(text) + 1))
    return path


class Run:
    """A training job; its steps are timed by when they are heard of."""

    def __init__(self, owner: Device, model: Path, text: Path, output: Path, *given: str) -> None:
        self._owner = owner
        command = owner.cli_command(
            "train", str(model), "--data", str(text), "--output", str(output), "--json", *given
        )
        self._process = subprocess.Popen(  # noqa: S603  # our own command
            command, stdout=subprocess.PIPE, text=True, env=owner.environment()
        )
        self.events: list[dict[str, Any]] = []
        self._times: list[float] = []
        self._heard = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            with self._heard:
                self.events.append(event)
                if event["event"] in ("plan", "replan"):
                    self._times.clear()  # steps of another plan are no measure of this one
                if event["event"] == "step":
                    self._times.append(time.monotonic())
                self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def wait_for(self, steps: int) -> None:
        """Until so many steps are done."""
        self.wait_until(lambda: self.steps >= steps, STEP_SECONDS * steps)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until something has been heard; RuntimeError if the job ends before that."""
        with self._heard:
            self._heard.wait_for(lambda: self._ended or condition(), seconds)
            if not condition():
                raise RuntimeError(f"the job ended early or takes too long: {self.events[-1:]}")

    @property
    def steps(self) -> int:
        """Done so far."""
        return max((e["step"] for e in self.events if e["event"] == "step"), default=0)

    @property
    def timed_steps(self) -> int:
        """Of the last plan."""
        return len(self._times)

    @property
    def replanned_after(self) -> int | None:
        """The step after which the plan changed first."""
        found = [e["resumed_from_step"] for e in self.events if e["event"] == "replan"]
        return found[0] if found else None

    def step_seconds(self) -> float:
        """Median of the times between two steps; the first one also fills memory."""
        gaps = [b - a for a, b in zip(self._times[1:], self._times[2:], strict=False)]
        return statistics.median(gaps)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds of each step that lies wholly between two moments of the monotonic clock."""
        inside = [at for at in self._times if begin <= at <= end]
        return [b - a for a, b in itertools.pairwise(inside)]

    @property
    def plan(self) -> dict[str, Any]:
        """The last plan."""
        return next(e for e in reversed(self.events) if e["event"] == "plan")

    def end(self) -> None:
        """Wait until the job is done, or end it."""
        if not self._ended:
            for job in self._owner.json("jobs")["jobs"]:
                if job["state"] in ("planning", "running"):
                    self._owner.cli("jobs", "cancel", job["id"])
        self._thread.join()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def timed(owner: Device, model: Path, text: Path, folder: Path, steps: int, *given: str) -> Run:
    """A job of so many steps, run to its end."""
    run = Run(owner, model, text, folder, "--steps", str(steps), *given)
    try:
        run.wait_for(steps)
    finally:
        run.end()
    return run
