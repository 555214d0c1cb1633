"""Training on a device whose disk is full, whose clock jumps, or that dies at its last word."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.devices import Device, met, running, swarm, wait_until
from tests.e2e.small_models import Small, copy_model, make_small
from tests.e2e.test_jobs import END_SECONDS, record, wait_for_no_workers
from tests.e2e.test_recovery import FAULT_AFTER, check, disturbed, full_run, replans

DISK_BYTES = 48_000_000
HOUR = 3600
FAKE_CLOCK = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama with tied ends."""
    return make_small("llama", tmp_path_factory.mktemp("llama"))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir(parents=True)
    options = f"size={DISK_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        if os.environ.get("CONFIDANT_REQUIRE_LAN") == "1":
            pytest.fail("a tmpfs cannot be mounted here")
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filler:
    """Leaves no room on the disk of a folder, whatever others take back, until it is removed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "filler"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_full)

    def start(self) -> None:
        """Full when this returns."""
        self._fill()
        assert shutil.disk_usage(self._file.parent).free == 0
        self._thread.start()

    def remove(self) -> None:
        """There is room again."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._file.unlink(missing_ok=True)

    def _keep_full(self) -> None:
        while not self._over.wait(0.005):
            self._fill()

    def _fill(self) -> None:
        with self._file.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(65_536)):
                pass


def test_a_full_disk_costs_no_committed_step(tmp_path: Path, small: Small) -> None:
    """The owner's fills up while the job runs; with room again it is resumed."""
    with small_disk(tmp_path / "swarm" / "anna") as home, contextlib.ExitStack() as last:
        filler = Filler(home)
        last.callback(filler.remove)
        devices = [Device(tmp_path / "swarm" / name, name) for name in ("anna", "ben", "cleo")]
        with running(devices):
            owner = devices[0]
            output = tmp_path / "out"
            events = disturbed(devices, small, output, lambda _: filler.start())
            notices = [e["message"] for e in events if e.get("code") == "no-checkpoint"]
            assert notices
            assert all("the disk is full" in notice for notice in notices), notices
            failed = events[-1]
            assert (failed["event"], failed["code"]) == ("failed", "storage"), failed
            assert "\n" not in failed["message"]
            assert "the disk is full" in failed["message"]
            job = owner.json("jobs")["jobs"][0]["id"]
            assert f"`confidant jobs resume {job}`" in failed["hint"]
            committed = record(owner, job)["committed"]
            assert committed > 0
            assert not output.exists()
            wait_for_no_workers(*devices)
            filler.remove()
            assert owner.json("jobs", "resume", job) == {"job": job}
            more = owner.events("jobs", "watch", job)
            assert replans(more)[-1]["resumed_from_step"] == committed
            check(more, full_run(small), output, "model.safetensors")


def flip(path: Path, offset: int) -> None:
    """One bit of a file, as a bad disk does: its times stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def train(owner: Device, small: Small, model: Path, output: Path) -> list[dict[str, Any]]:
    """The events of three steps over two devices."""
    return owner.events(
        "train", str(model), "--data", str(small.text), "--output", str(output), "--steps", "3",
        "--batch-size", "8", "--microbatches", "4", "--sequence-length", str(small.length),
        "--devices", "anna,ben", "--owner-ends", "always",
    )  # fmt: skip


def test_what_a_disk_forgets_is_noticed_and_fetched_again(tmp_path: Path, small: Small) -> None:
    """One bit of every weight and program that a device has kept; then one of the model itself."""
    model = copy_model(small.folder, tmp_path / "model")
    with swarm(tmp_path / "swarm", 2) as devices:
        owner, ben = devices
        first = train(owner, small, model, tmp_path / "first")
        kept = [path for path in (ben.home / "store" / "blobs").iterdir() if path.is_file()]
        for path in kept:
            flip(path, path.stat().st_size // 2)
        second = train(owner, small, model, tmp_path / "second")
        losses = [[e["loss"] for e in run if e["event"] == "step"] for run in (first, second)]
        assert len(losses[0]) == 3
        assert losses[0] == losses[1]
        assert ben.log.read_text().count("is damaged on this disk") >= len(kept) / 2 > 1
        weights = model / "model.safetensors"
        flip(weights, weights.stat().st_size - 100)
        last = train(owner, small, model, tmp_path / "third")[-1]
        assert (last["event"], last["code"]) == ("failed", "bad-model"), last
        assert last["message"] == f"{weights} has changed on the disk"
        assert not (tmp_path / "third").exists()
        wait_for_no_workers(*devices)


def test_a_model_file_that_is_cut_off(tmp_path: Path, small: Small) -> None:
    model = copy_model(small.folder, tmp_path / "model")
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with swarm(tmp_path / "swarm", 1) as (owner,):
        done = owner.cli(
            "train", str(model), "--data", str(small.text), "--output", str(tmp_path / "out")
        )
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert "model.safetensors" in line
        assert owner.json("jobs")["jobs"] == []


class Clock:
    """The wall clock that a device sees; others do not."""

    def __init__(self, file: Path) -> None:
        assert FAKE_CLOCK is not None
        self._file = file
        self.jump(0)
        self.settings = {
            "LD_PRELOAD": str(FAKE_CLOCK), "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    def jump(self, seconds: int) -> None:
        """So far from the real one from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self._file)

    def time(self) -> float:
        """What the device reads."""
        done = subprocess.run(
            ["date", "+%s"], capture_output=True, text=True, check=True,
            env={**os.environ, **self.settings},
        )  # fmt: skip
        return float(done.stdout)


@pytest.mark.alone  # a machine with too much to do may take somebody for gone, too
@pytest.mark.skipif(
    FAKE_CLOCK is None and os.environ.get("CONFIDANT_REQUIRE_LAN") != "1",
    reason="needs libfaketime (Debian: apt install faketime)",
)
def test_a_clock_that_jumps_by_an_hour_is_nothing(tmp_path: Path, small: Small) -> None:
    """The owner's forward and another one's back, while a job runs and while members meet."""
    folder = tmp_path / "swarm"
    folder.mkdir()
    clocks = [Clock(folder / "anna.clock"), Clock(folder / "ben.clock")]
    devices = [
        Device(folder / "anna", "anna", settings=clocks[0].settings),
        Device(folder / "ben", "ben", settings=clocks[1].settings),
        Device(folder / "cleo", "cleo"),
    ]
    with running(devices):
        ben = devices[1]

        def jump(_: list[Device]) -> None:
            before = clocks[0].time()
            clocks[0].jump(HOUR)
            clocks[1].jump(-HOUR)
            assert clocks[0].time() - before >= HOUR - 60
            assert before - clocks[1].time() >= HOUR - 60

        events = disturbed(devices, small, tmp_path / "out", jump)
        check(events, full_run(small), tmp_path / "out", "model.safetensors")
        assert not replans(events), "nobody was taken for gone"
        committed = [e["checkpoint"]["step"] for e in events if e.get("checkpoint")]
        assert committed[-1] > 2 * FAULT_AFTER, "no checkpoint after the jump"
        ben.stop()
        ben.start()
        wait_until(lambda: met(devices), END_SECONDS, "all alive with clocks that differ")


def test_a_job_that_was_done_but_for_its_last_word(tmp_path: Path, small: Small) -> None:
    """The daemon is killed when the output has taken its place: nothing is trained again."""
    with swarm(tmp_path / "swarm", 1) as (owner,):
        output = tmp_path / "out"
        events = owner.events(
            "train", str(small.folder), "--data", str(small.text), "--output", str(output),
            "--steps", "3", "--batch-size", "8", "--microbatches", "4",
            "--sequence-length", str(small.length),
        )  # fmt: skip
        done = events[-1]
        assert done["event"] == "done"
        owner.kill()
        (place,) = (owner.home / "jobs").glob(done["job"])
        kept = json.loads((place / "job.json").read_text())
        (place / "job.json").write_text(json.dumps({**kept, "state": "running"}))
        lines = (place / "events.jsonl").read_text().splitlines()
        (place / "events.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        owner.start()
        assert record(owner, done["job"])["state"] == "done"
        assert owner.events("jobs", "watch", done["job"])[-1] == done
        assert (output / "model.safetensors").is_file()
