"""`train`, `jobs watch` and `generate`: requests, progress, the end, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.component import cli_answers as answers
from tests.component.cli_support import (
    HANG,
    FakeDaemon,
    command,
    confidant,
    environment,
    fake_daemon,
)

JOB = answers.JOB["id"]
WAIT_SECONDS = 30.0
TRAIN = ("train", "/models/small", "--data", "/data/text", "--output", "/models/out")


def training(events: list[Any]) -> dict[str, Any]:
    """The answers to `train` and `jobs watch`."""
    return {
        "POST /v1/train": {"job": JOB},
        f"GET /v1/jobs/{JOB}": answers.JOB,
        f"GET /v1/jobs/{JOB}/events": events,
    }


def test_json_is_every_event_of_the_daemon(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, training(answers.TRAINING)):
        done = confidant(tmp_path, *TRAIN, "--json")
        watched = confidant(tmp_path, "jobs", "watch", JOB, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line) for line in done.stdout.splitlines()] == answers.TRAINING
    assert watched.stdout == done.stdout


def test_plain_progress_for_logs(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, training(answers.TRAINING)):
        done = confidant(tmp_path, *TRAIN, "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for part in (
        "compiling programs",
        "step 3/3  loss 2.0000  lr 2.00e-05  640 tok/s  busy 91% 87%",
        "held-out loss after 3 steps: 2.5000",
        "new plan (epoch 2): ben is gone",
        "900 MB",
        "saved in /models/out",
    ):
        assert part in done.stdout


def test_live_progress_in_a_terminal(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, training(answers.TRAINING)):
        status, text = in_a_terminal(*TRAIN, "--home", str(tmp_path))
    assert status == 0
    for part in ("sending layers", "300 MB of 1.0 GB", "1 min 05 s left", "saved in /models/out"):
        assert part in text


def in_a_terminal(*arguments: str) -> tuple[int, str]:
    """Run a command whose standard output is a terminal; status and all it drew."""
    ours, its = os.openpty()
    process = subprocess.Popen(
        command(*arguments), stdout=its, stderr=its, stdin=its, env=environment()
    )
    os.close(its)
    drawn = b""
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            while chunk := screen.read(65_536):
                drawn += chunk
        except OSError:  # a closed terminal ends with an error on Linux
            pass
    return process.wait(WAIT_SECONDS), drawn.decode()


def test_every_option_reaches_the_daemon(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, training(answers.TRAINING)) as daemon:
        done = confidant(
            tmp_path, "train", "small", "--data", "a.txt", "b.txt", "--data", "/c.txt", "--output",
            "out", "--method", "lora", "--rank", "4", "--alpha", "8", "--task", "causal-lm",
            "--steps", "5", "--batch-size", "16", "--microbatches", "2", "--sequence-length", "64",
            "--learning-rate", "1e-3", "--schedule", "cosine", "--warmup-steps", "0",
            "--weight-decay", "0.1", "--max-grad-norm", "0", "--seed", "7", "--no-shuffle",
            "--init-adapter", "adapter", "--target-modules", "q_proj,v_proj",
            "--eval-data", "held.txt", "--eval-every", "2", "--devices", "anna,ben",
            "--detach",
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{JOB}\n")
    here = Path.cwd()
    assert daemon.requests[0].body == {
        "model": str(here / "small"), "output": str(here / "out"),
        "data": [str(here / "a.txt"), "/c.txt", str(here / "b.txt")],
        "method": "lora", "rank": 4, "alpha": 8.0, "task": "causal-lm", "steps": 5,
        "batch_size": 16, "microbatches": 2, "sequence_length": 64, "learning_rate": 1e-3,
        "schedule": "cosine", "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 0.0,
        "seed": 7, "shuffle": False, "init_adapter": str(here / "adapter"),
        "target_modules": ["q_proj", "v_proj"], "eval_data": str(here / "held.txt"),
        "eval_every": 2, "devices": ["anna", "ben"],
    }  # fmt: skip


def test_a_job_that_fails(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, training([answers.step(1), answers.FAILED])):
        done = confidant(tmp_path, *TRAIN)
        as_json = confidant(tmp_path, *TRAIN, "--json")
    assert done.returncode == 1
    assert done.stderr == "confidant: the device ben [2J is gone. start it again\n"
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout.splitlines()[-1]) == answers.FAILED


@pytest.mark.parametrize(
    ("events", "said"),
    [([answers.step(1)], "daemon"), ([answers.step(1), {"event": "cancelled"}], "cancelled")],
)
def test_a_job_that_does_not_end_well(tmp_path: Path, events: list[Any], said: str) -> None:
    with fake_daemon(tmp_path, training(events)):
        done = confidant(tmp_path, *TRAIN)
    assert done.returncode == 1
    assert said in done.stderr


def test_generated_text_streams(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"POST /v1/generate": answers.GENERATION}) as daemon:
        done = confidant(
            tmp_path, "generate", "/models/small", "--prompt", "Once", "--temperature", "0.7",
            "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "9", "--adapter", "/adapter",
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == " there was\na \ufffd[31mcat\n"  # the model does not steer the terminal
    assert daemon.requests[0].body == {
        "model": "/models/small", "prompt": "Once", "temperature": 0.7, "top_p": 0.9, "seed": 3,
        "max_new_tokens": 9, "adapter": "/adapter",
    }  # fmt: skip


def test_generated_json_is_the_contracts(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"POST /v1/generate": answers.GENERATION}):
        done = confidant(tmp_path, "generate", "m", "--prompt", "Once", "--json")
    assert json.loads(done.stdout) == answers.GENERATED


@pytest.mark.parametrize("events", [[answers.FAILED], [answers.progress("load", 1, 2, "ben")]])
def test_a_generation_that_fails(tmp_path: Path, events: list[Any]) -> None:
    with fake_daemon(tmp_path, {"POST /v1/generate": events}):
        done = confidant(tmp_path, "generate", "m", "--prompt", "Once", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["message"]


@contextmanager
def started(daemon: FakeDaemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that waits for the daemon, once it does."""
    process = subprocess.Popen(
        command(*arguments, "--home", str(daemon.home)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    with process:
        try:
            assert daemon.hanging.wait(WAIT_SECONDS)
            yield process
        finally:
            process.kill()


def test_ctrl_c_leaves_a_job_running_and_says_how_to_go_on(tmp_path: Path) -> None:
    with (
        fake_daemon(tmp_path, training([answers.step(1), HANG])) as daemon,
        started(daemon, *TRAIN) as process,
    ):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert f"confidant jobs watch {JOB}" in said
    assert f"confidant jobs cancel {JOB}" in said
    assert "Traceback" not in said
    assert not any(request.path.endswith("cancel") for request in daemon.requests)


def test_ctrl_c_ends_a_generation(tmp_path: Path) -> None:
    with (
        fake_daemon(tmp_path, {"POST /v1/generate": [*answers.GENERATION[:2], HANG]}) as daemon,
        started(daemon, "generate", "m", "--prompt", "Once") as process,
    ):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_SECONDS)
        assert daemon.left.wait(WAIT_SECONDS)  # the connection ended: the daemon cancels
    assert (process.returncode, said) == (130, "")


def test_peers_are_watched_until_ctrl_c(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"GET /v1/peers": answers.PEERS}):
        process = subprocess.Popen(
            command("peers", "--watch", "--json", "--home", str(tmp_path)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            for _ in range(2):
                assert json.loads(process.stdout.readline()) == answers.PEERS
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, said) == (130, "")
