"""A training job while 200 strangers connect, a member floods, and one opens 1,000 connections.

Run from the project's folder, as root: `python -m benchmarks.strangers`. Two devices are daemons
with 0.45 of a core each, for daemon and worker together; the attackers have half a core. Within
one job quiet times and attacks on the owner's daemon take turns, so that each attack is compared
with the quiet before and after it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.fleet import NAMES, Run, make_model, make_text
from benchmarks.report import Claim, options, report
from confidantd.identity.certificate import load_or_create
from confidantd.identity.trust import TrustStore
from tests.control_groups import CpuQuota, quotas
from tests.e2e.devices import Device, running

SHARE, ATTACKERS_SHARE = 0.45, 0.5
HIDDEN, COLUMNS, LAYERS, SEQUENCES, LENGTH = 256, 704, 8, 8, 128
WINDOW, QUICK_WINDOW, SETTLE = 20.0, 8.0, 2.0  # seconds
SLOWER_REACH, GROWN_REACH = 0.10, 32.0  # share, MB
KINDS = ("strangers", "flood", "stall")
MEGABYTE = 1e6


class Memory:
    """The largest resident set of a process while it is watched."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, self._process.memory_info().rss)

    def grown(self) -> float:
        """Megabytes; ends the watching."""
        self._over.set()
        self._thread.join()
        return (self.most - self.before) / MEGABYTE


@contextmanager
def attack(kind: str, target: Device, home: Path, group: CpuQuota) -> Iterator[None]:
    """An attacker at work."""
    host, _, port = target.json("status")["address"].rpartition(":")
    command = [
        *group.prefix, sys.executable, "-m", "benchmarks.attackers", kind, host, port, str(home),
    ]  # fmt: skip
    with (home / "log").open("a") as log:
        process = subprocess.Popen(command, stderr=log)  # noqa: S603 - our own command
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError((home / "log").read_text()[-2000:])
    finally:
        process.terminate()
        process.wait()


def attacks(folder: Path, window: float) -> Iterator[Claim]:
    """Every kind on the same job."""
    with quotas(SHARE, SHARE, ATTACKERS_SHARE) as groups:
        devices = [
            Device(folder / name, name, prefix=group.prefix)
            for name, group in zip(NAMES, groups[:2], strict=False)
        ]
        with running(devices):
            owner = devices[0]
            homes = {kind: folder / kind for kind in KINDS}
            for kind in ("flood", "stall"):
                _pair(owner, homes[kind])
            load_or_create(homes["strangers"])
            run = Run(
                owner, make_model(folder / "model", HIDDEN, COLUMNS, LAYERS),
                make_text(folder / "text.txt", 100 * SEQUENCES * LENGTH), folder / "out",
                "--steps", "100000", "--batch-size", str(SEQUENCES),
                "--sequence-length", str(LENGTH), "--owner-ends", "never",
                "--devices", ",".join(d.name for d in devices),
            )  # fmt: skip
            try:
                run.wait_for(5)
                quiet = _quiet(run, window)
                for kind in KINDS:
                    memory = Memory(owner.pid)
                    with attack(kind, owner, homes[kind], groups[2]):
                        attacked = _quiet(run, window)
                    grown, after = memory.grown(), _quiet(run, window)
                    calm = statistics.median([*quiet, *after])
                    slower = statistics.median(attacked) / calm - 1
                    yield Claim(
                        f"{kind}, a step takes longer", slower, SLOWER_REACH, "share",
                        f"{calm:.3f} s in quiet, {len(attacked)} steps attacked",
                    )  # fmt: skip
                    yield Claim(f"{kind}, memory of the daemon", grown, GROWN_REACH, "MB more")
                    quiet = after
            finally:
                run.end()


def _pair(device: Device, home: Path) -> None:
    """An attacker that the device lets in."""
    identity = load_or_create(home)
    trust, pem = TrustStore(home), home / "device.pem"
    device.cli("members", "export", str(pem))
    trust.add(pem.read_text())
    own = home / "own.pem"
    own.write_text(identity.certificate_pem)
    device.cli("members", "add", str(own))


def _quiet(run: Run, window: float) -> list[float]:
    """Seconds of the steps of a window, after a moment in which things settle."""
    time.sleep(SETTLE)
    begin = time.monotonic()
    time.sleep(window)
    return run.gaps(begin, time.monotonic())


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as made:
        seconds = QUICK_WINDOW if given.quick else WINDOW
        sys.exit(report(attacks(Path(made), seconds), as_json=given.json))
