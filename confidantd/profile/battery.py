"""Battery state: from the system, from Termux's own command on Android, or a given command."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from confidantd.profile.temperature import plausible

TERMUX_COMMAND = "termux-battery-status"
LEFT_SECONDS = 0.5  # for what an ended command has printed
COMMAND_SECONDS = 5.0  # it hangs where the Termux:API app is missing
KEPT_SECONDS = 60.0  # a battery changes by less than one percent in that time


@dataclass(frozen=True, slots=True)
class Battery:
    """Charging, charge and temperature; None where there is no battery or no permission to ask."""

    charging: bool | None = None
    percent: float | None = None
    celsius: float | None = None


def read_battery(given: BatteryCommand | None = None) -> Battery:
    """The battery of this device, from a `given` command or the system. Never waits."""
    if given is not None:
        return given.latest()
    if sys.platform == "android":
        command = _termux()
        return Battery() if command is None else command.latest()
    try:
        found = psutil.sensors_battery()
    except (AttributeError, OSError, NotImplementedError):
        return Battery()
    if found is None:
        return Battery()
    return Battery(bool(found.power_plugged), float(found.percent))


class BatteryCommand:
    """Asks a command again and again without waiting for it.

    `latest` starts the command when the answer is old, and takes its answer in a later
    call; one that does not end in time is killed.
    """

    def __init__(self, command: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._command = tuple(command)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._battery = Battery()

    def latest(self) -> Battery:
        """The last answer; all None until there is one."""
        now = self._clock()
        if self._process is not None:
            self._look(self._process, now)
        elif now - self._started >= KEPT_SECONDS:
            self._started = now
            self._process = _started(self._command)
        return self._battery

    def _look(self, process: subprocess.Popen[bytes], now: float) -> None:
        if process.poll() is None:
            if now - self._started < COMMAND_SECONDS:
                return
            _kill_all(process)
        self._process = None
        self._battery = parse_battery(_output(process))


def parse_battery(output: bytes) -> Battery:
    """What `termux-battery-status` printed, or a command like it; all None if that is no answer.

    JSON: `percentage`, `plugged` ("UNPLUGGED", or by what) and, where known, `temperature`.
    """
    try:
        found = json.loads(output)
        charging = found.get("plugged", "UNPLUGGED") != "UNPLUGGED"
        percent = float(found["percentage"])
        celsius = float(found.get("temperature") or 0.0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Battery()
    if not 0 <= percent <= 100:  # nor if it is NaN
        return Battery()
    return Battery(charging, percent, plausible(celsius))


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """With what it started: it may be a script."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _output(process: subprocess.Popen[bytes]) -> bytes:
    """Of a command that has ended; nothing if what it left behind keeps its output open."""
    try:
        output, _ = process.communicate(timeout=LEFT_SECONDS)
    except subprocess.TimeoutExpired:
        _kill_all(process)
        if process.stdout is not None:
            process.stdout.close()
        return b""
    return output


def _started(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(  # noqa: S603  # a fixed command, found on the path
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None


@functools.cache
def _termux() -> BatteryCommand | None:
    found = shutil.which(TERMUX_COMMAND)
    return None if found is None else BatteryCommand([found])
