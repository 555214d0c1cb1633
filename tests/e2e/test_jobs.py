"""Jobs that are watched, cancelled, or lose a part: a clear word, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.devices import Device, swarm, wait_until
from tests.e2e.small_models import TEXT, Small, make_small

RUNNING_SECONDS = 90.0
END_SECONDS = 30.0
ENDLESS = "100000"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama."""
    return make_small("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Device]]:
    """Two daemons."""
    with swarm(tmp_path / "swarm", 2) as found:
        yield found


def start(owner: Device, small: Small, output: Path, steps: str = ENDLESS) -> str:
    """Start a detached job over both devices; its id."""
    answer = owner.json(
        "train", str(small.folder), "--data", str(TEXT), "--output", str(output),
        "--steps", steps, "--batch-size", "4", "--microbatches", "2",
        "--sequence-length", "64", "--detach", "--devices", "anna,ben",
    )  # fmt: skip
    return str(answer["job"])


def record(owner: Device, job: str) -> dict[str, Any]:
    """What `jobs show` says."""
    found: dict[str, Any] = owner.json("jobs", "show", job)
    return found


def wait_for_steps(owner: Device, job: str) -> None:
    """Until the job has done some steps."""
    wait_until(
        lambda: record(owner, job)["step"] > 2 or record(owner, job)["state"] == "failed",
        RUNNING_SECONDS,
        "training",
    )
    assert record(owner, job)["state"] == "running", record(owner, job)


def started(owner: Device, small: Small, output: Path) -> str:
    """A job that has done some steps; its id."""
    job = start(owner, small, output)
    wait_for_steps(owner, job)
    return job


def workers(device: Device) -> list[psutil.Process]:
    """The worker processes of a daemon."""
    found = []
    for child in psutil.Process(device.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends just now
            if "confidantd.worker" in child.cmdline():
                found.append(child)
    return found


def wait_for_no_workers(*devices: Device) -> None:
    """Until no daemon has a worker any more."""
    wait_until(lambda: not any(workers(d) for d in devices), END_SECONDS, "workers gone")


def test_a_job_is_listed_watched_and_cancelled(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    owner = devices[0]
    job = started(owner, small, tmp_path / "out")
    listed = owner.json("jobs")["jobs"]
    assert [(j["id"], j["kind"], j["state"]) for j in listed] == [(job, "train", "running")]
    assert sorted(listed[0]["devices"]) == ["anna", "ben"]
    watcher = subprocess.Popen(
        owner.cli_command("jobs", "watch", job, "--json"), stdout=subprocess.PIPE, text=True,
        env=owner.environment(),
    )  # fmt: skip
    owner.json("jobs", "cancel", job)
    lines, _ = watcher.communicate(timeout=END_SECONDS)
    events = [json.loads(line) for line in lines.splitlines()]
    assert watcher.returncode == 1
    assert events[-1]["event"] == "failed"
    assert events[-1]["code"] == "cancelled"
    assert {"plan", "step"} <= {event["event"] for event in events}
    assert record(owner, job)["state"] == "cancelled"
    wait_for_no_workers(*devices)
    assert not (tmp_path / "out").exists()
    wait_until(
        lambda: owner.json("status")["memory"]["granted_bytes"] == 0, END_SECONDS, "memory freed"
    )


def test_workers_are_confined_and_end_with_their_daemon(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    owner, other = devices
    job = started(owner, small, tmp_path / "out")
    orphans = workers(other)
    confined = Path(f"/proc/{orphans[0].pid}/status").read_text()
    assert "NoNewPrivs:\t1" in confined
    other.kill()
    psutil.wait_procs(orphans, END_SECONDS)
    assert not [orphan for orphan in orphans if orphan.is_running()]
    wait_until(lambda: record(owner, job)["devices"] == ["anna"], END_SECONDS, "going on alone")
    owner.json("jobs", "cancel", job)
    wait_for_no_workers(owner)
    assert not (tmp_path / "out").exists()


def talks_to(one: Device, other: Device) -> bool:
    """Whether the daemon of one has a TCP connection to that of the other."""
    open_ = [
        {c.laddr, c.raddr}
        for device in (one, other)
        for c in psutil.Process(device.pid).net_connections("tcp")
        if c.status == psutil.CONN_ESTABLISHED
    ]
    return any(open_.count(ends) > 1 for ends in open_)


def test_a_lost_owner_frees_its_stages(devices: list[Device], small: Small, tmp_path: Path) -> None:
    owner, other = devices
    job = started(owner, small, tmp_path / "out")
    owner.kill()
    wait_for_no_workers(other)
    wait_until(
        lambda: other.json("status")["memory"]["granted_bytes"] == 0, END_SECONDS, "memory freed"
    )
    owner.start()
    assert record(owner, job)["state"] in ("recovering", "running")
    owner.json("jobs", "cancel", job)
    wait_until(lambda: record(owner, job)["state"] == "cancelled", END_SECONDS, "its end")


def test_a_daemon_that_stops_ends_its_job_and_workers(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    owner, other = devices
    started(owner, small, tmp_path / "out")
    children = workers(owner)
    assert owner.stop() == 0
    assert not [child for child in children if child.is_running()]
    assert not (owner.home / "control.sock").exists()
    wait_for_no_workers(other)


def test_records_data_and_evaluation(devices: list[Device], small: Small, tmp_path: Path) -> None:
    records = tmp_path / "data.jsonl"
    lines = [line for line in TEXT.read_text().splitlines() if line]
    records.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    stores = [device.home / "store" / "blobs" for device in devices]
    lent = {path.name for blobs in stores for path in blobs.iterdir()}  # programs of other tests
    events = devices[0].events(
        "train", str(small.folder), "--data", str(records), "--output", str(tmp_path / "out"),
        "--epochs", "1", "--batch-size", "4", "--microbatches", "2", "--sequence-length", "64",
        "--eval-data", str(TEXT), "--eval-every", "5", "--learning-rate", "1e-3", "--seed", "3",
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    steps = [event["step"] for event in events if event["event"] == "step"]
    tokens = len("\0".join(lines))
    assert len(steps) == tokens // 64 // 4
    evaluated = [event["step"] for event in events if event["event"] == "eval"]
    assert evaluated == [0, *range(5, len(steps), 5), len(steps)]
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0]
    kept = [path.name for path in (devices[0].home / "jobs").rglob("tokens.bin")]
    assert not kept, "tokens of the user's text outlive the job"
    for blobs in stores:
        wait_until(
            lambda found=blobs: sum(1 for path in found.iterdir() if path.suffix) == 0,
            END_SECONDS,
            "no unfinished blob",
        )
        wait_until(
            lambda found=blobs.parent / "passing": not list(found.iterdir()),
            END_SECONDS,
            "no state of a job",
        )
        new = (path for path in blobs.iterdir() if path.name not in lent)
        model_and_programs = sum(path.stat().st_size for path in new)
        assert model_and_programs < 2_000_000, "trained tensors outlive the job"
