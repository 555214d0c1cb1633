"""Real daemons on loopback: started with homes of their own, paired at first, ended by pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from confidantd.identity.trust import TrustStore
from tests.e2e import compiled

READY_SECONDS = 30.0
STOP_SECONDS = 20.0
MEET_SECONDS = 30.0
ASK_SECONDS = 20.0


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked again and again for at most `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        pause.wait(0.05)


class Device:
    """One daemon and the CLI commands given to it."""

    def __init__(
        self,
        home: Path,
        name: str,
        *options: str,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        host: str = "127.0.0.1",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home
        self.name = name
        self.options = list(options)
        self.python = python
        self.prefix = list(prefix)
        self.host = host
        self.settings = dict(settings or {})
        self.process: subprocess.Popen[str] | None = None
        self.log = home.parent / f"{name}.log"

    def environment(self) -> dict[str, str]:
        """Without this shell's own Confidant settings; one thread per process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CONFIDANT_")}
        common = {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONWARNINGS": "ignore"}
        return {**kept, **common, **self.settings}

    def command(self) -> list[str]:
        """The command line of the daemon; the CPU alone unless a test names backends."""
        backends = [] if "--backend" in self.options else ["--backend", "cpu"]
        return [
            *self.prefix, self.python, "-m", "confidantd.daemon", "--home", str(self.home),
            "--name", self.name, "--host", self.host, "--threads", "1", *backends, *self.options,
        ]  # fmt: skip

    def start(self) -> Device:
        """Start the daemon and wait for its ready line."""
        self.launch()
        return self.wait_until_ready()

    def launch(self) -> None:
        """Start the daemon."""
        if not self.slower:
            compiled.lend_profile(self.home, self._kind)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment(),
            )

    def wait_until_ready(self) -> Device:
        """Wait for the ready line of a daemon that was launched."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "ready" in line, f"{self.name} did not start: {self.log.read_text()[-2000:]}"
        return self

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, as when a battery is pulled."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not end within {STOP_SECONDS} s") from None
        finally:
            self.process.stdout.close()
        if not self.slower:
            compiled.keep_profile(self.home, self._kind)
        return status

    @property
    def slower(self) -> bool:
        """Whether it may be slower than others: it has less than a core."""
        return bool(self.prefix) and "netns" not in self.prefix

    @property
    def _kind(self) -> str:
        """Of devices that measure the same."""
        choices = [word for word in self.options if not word.startswith(("/", "127.", "10."))]
        packages = os.environ.get("PYTHONPATH", "")
        return json.dumps([self.python, packages, choices, sorted(self.settings.items())])

    def cli_command(self, *arguments: str) -> list[str]:
        """The command line of a CLI call to this daemon."""
        return [
            *self.prefix, self.python, "-m", "confidantd.cli.main",
            *arguments, "--home", str(self.home),
        ]  # fmt: skip

    def cli(self, *arguments: str, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a CLI command to its end."""
        return subprocess.run(
            self.cli_command(*arguments),
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=seconds,
            check=False,
        )

    def json(self, *arguments: str, seconds: float = 300.0) -> Any:
        """The JSON of a command that must work."""
        done = self.cli(*arguments, "--json", seconds=seconds)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(done.stdout)

    def events(self, *arguments: str, seconds: float = 600.0) -> list[dict[str, Any]]:
        """The JSON lines of a command, whether it works or not."""
        done = self.cli(*arguments, "--json", seconds=seconds)
        assert done.stdout, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ask(self, path: str) -> Any:
        """What the daemon answers on its socket: who asks again and again needs no CLI for it."""
        connection = _SocketConnection(self.home / "control.sock")
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200, f"{path}: {answer.status}"
            return json.loads(answer.read())
        finally:
            connection.close()

    def states(self) -> dict[str, str]:
        """Peer names to states, this device left out; a stranger hides no member of its name."""
        others = [p for p in self.ask("/v1/peers")["peers"] if not p.get("self")]
        others.sort(key=lambda peer: peer["state"] != "unpaired")
        return {peer["name"]: peer["state"] for peer in others}

    def coordinator(self) -> str | None:
        """Name of the coordinator this device follows."""
        found = self.ask("/v1/status")["coordinator"]
        return None if found is None else str(found["name"])


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ASK_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ASK_SECONDS)
        self.sock.connect(str(self._path))


def pair(devices: Sequence[Device]) -> None:
    """Let every device in at the others before they start."""
    for device in devices:
        make_identity(device)
    for device in devices:
        trust = TrustStore(device.home)
        for other in devices:
            if other is not device:
                trust.add((other.home / "identity" / "certificate.pem").read_text())


def make_identity(device: Device) -> None:
    """Make the home and the identity of a device that has never run."""
    device.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run(
        [device.python, "-m", "confidantd.identity", "create", str(device.home / "identity")],
        check=True,
        capture_output=True,
        env=device.environment(),
    )


@contextlib.contextmanager
def swarm(
    folder: Path, count: int, *options: str, names: Sequence[str] = ("anna", "ben", "cleo", "dora")
) -> Iterator[list[Device]]:
    """`count` paired daemons that see each other and agree on a coordinator."""
    with running([Device(folder / name, name, *options) for name in names[:count]]) as devices:
        yield devices


@contextlib.contextmanager
def running(devices: list[Device]) -> Iterator[list[Device]]:
    """These daemons, paired and met; the first one, which owns most jobs, has the programs that
    the first ones of other tests compiled.
    """
    pair(devices)
    compiled.lend(devices[0].home)
    for device in devices:
        if not device.slower:
            compiled.lend_speeds(device.home)
    try:
        for device in devices:
            device.start()
            if device is devices[0]:
                address = device.json("status")["address"]
                for other in devices[1:]:
                    other.options += ["--peer", address]
        wait_until(lambda: met(devices), MEET_SECONDS, "all alive with one coordinator")
        yield devices
    finally:
        for device in devices:
            if device.process is not None and device.process.poll() is None:
                device.stop()
        compiled.keep(devices[0].home)


def met(devices: Sequence[Device]) -> bool:
    """Whether all devices see each other alive and follow one coordinator."""
    for device in devices:
        if list(device.states().values()).count("alive") != len(devices) - 1:
            return False
    found = {device.coordinator() for device in devices}
    return len(found) == 1 and None not in found
