"""What a device says it has: memory under every limit, promises, battery."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from confidantd.profile.battery import (
    COMMAND_SECONDS,
    KEPT_SECONDS,
    Battery,
    BatteryCommand,
    parse_battery,
    read_battery,
)
from confidantd.profile.cgroup import memory_limits
from confidantd.profile.readiness import Condition
from confidantd.profile.resources import offered_bytes, read_resources, usable_cores

ANSWER = '{"health": "GOOD", "percentage": 61, "plugged": "PLUGGED_AC"}'


def group(folder: Path, **files: str) -> None:
    """A control group's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_limits_of_every_level(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/a/b\n")
    group(tmp_path / "a" / "b", memory__max="max\n", memory__current="5\n")
    group(
        tmp_path / "a",
        memory__max="1000\n",
        memory__current="600\n",
        memory__stat="anon 100\ninactive_file 250\nactive_file 9\nfile_mapped 9\n",
    )
    assert memory_limits(tmp_path, tmp_path / "self") == [(1000, 350)]


def test_the_cache_of_what_has_ended_can_be_dropped(tmp_path: Path) -> None:
    """Used lately or not; but not that of files that a process maps."""
    (tmp_path / "self").write_text("0::/a\n")
    for mapped, used in ((0, 350), (30, 380), (40, 390), (1000, 390)):
        group(
            tmp_path / "a",
            memory__max="1000\n",
            memory__current="600\n",
            memory__stat=f"inactive_file 210\nactive_file 40\nfile_mapped {mapped}\n",
        )
        assert memory_limits(tmp_path, tmp_path / "self") == [(1000, used)]


def test_version_1_limits_and_no_limit(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    group(
        tmp_path / "memory",  # in a container only the top is there
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="500",
        memory__stat="inactive_file 1\ntotal_inactive_file 700\n",
    )
    assert memory_limits(tmp_path, tmp_path / "self") == [(2000, 0)]
    group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    assert memory_limits(tmp_path, tmp_path / "self") == []


def test_denied_control_groups(tmp_path: Path) -> None:
    assert memory_limits(tmp_path, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("available", "cap", "granted", "workers", "offered"),
    [
        (1000, None, 0, 0, 900),
        (1000, 400, 0, 0, 400),
        (1000, None, 300, 0, 600),  # promised, not yet used
        (700, None, 300, 300, 630),  # in use: the system has subtracted it already
        (700, 400, 300, 300, 100),
        (1000, 200, 300, 0, 0),
        (0, None, 100, 500, 0),
    ],
)
def test_what_is_promised_is_not_offered_again(
    available: int, cap: int | None, granted: int, workers: int, offered: int
) -> None:
    assert offered_bytes(available, cap, granted, workers) == offered


def test_this_device() -> None:
    found = read_resources(memory_cap=1000, granted_bytes=300, threads=2, gflops=5.0)
    assert found.available_bytes == 700
    assert found.granted_bytes == 300
    assert found.memory_bytes > 0
    assert found.cores == usable_cores() >= 1
    assert found.backends == ("cpu",)
    assert 0 <= found.load <= 1
    assert (found.threads, found.gflops) == (2, 5.0)
    probed = read_resources(
        memory_cap=None, granted_bytes=0, threads=1, gflops=5.0, backends=("cpu", "webgpu")
    )
    assert probed.backends == ("cpu", "webgpu")
    assert (found.charging, found.temperature_celsius, found.refuses) == (None, None, "")
    hot = Condition(Battery(False, 61.0), 44.5, "its battery is at 61 %")
    tired = read_resources(memory_cap=None, granted_bytes=0, threads=1, gflops=5.0, condition=hot)
    assert (tired.charging, tired.battery_percent, tired.temperature_celsius) == (False, 61, 44.5)
    assert tired.refuses == "its battery is at 61 %"


@pytest.mark.parametrize(
    ("output", "battery"),
    [
        (ANSWER.encode(), Battery(True, 61.0)),
        (b'{"percentage": 7, "plugged": "UNPLUGGED"}', Battery(False, 7.0)),
        (
            b'{"percentage": 7, "plugged": "UNPLUGGED", "temperature": 31.4}',
            Battery(False, 7.0, 31.4),
        ),
        (b'{"percentage": 7, "temperature": NaN}', Battery(False, 7.0)),
        (b'{"percentage": 7, "temperature": 1e9}', Battery(False, 7.0)),
        (b'{"percentage": NaN}', Battery()),
        (b'{"percentage": 700}', Battery()),
        (b'{"percentage": 7, "temperature": "warm"}', Battery()),
        (b"", Battery()),
        (b"[1]", Battery()),
        (b'{"percentage": null}', Battery()),
    ],
)
def test_what_termux_prints(output: bytes, battery: Battery) -> None:
    assert parse_battery(output) == battery


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_given_command_counts_before_the_system() -> None:
    clock = Clock()
    command = BatteryCommand([sys.executable, "-c", f"print('{ANSWER}')"], clock)
    read_battery(command)
    assert command._process is not None
    command._process.wait(30)
    assert read_battery(command) == Battery(True, 61.0)


def test_a_battery_command_is_never_waited_for() -> None:
    clock = Clock()
    command = BatteryCommand([sys.executable, "-c", f"print('{ANSWER}')"], clock)
    assert command.latest() == Battery()
    assert command._process is not None
    command._process.wait(30)
    assert command.latest() == Battery(True, 61.0)
    assert command.latest() == Battery(True, 61.0)
    assert command._process is None  # the answer is kept
    clock.now = KEPT_SECONDS
    command.latest()
    assert command._process is not None
    command._process.wait(30)
    command.latest()


def test_a_battery_command_that_hangs_is_killed() -> None:
    clock = Clock()
    pause = "import signal; signal.pause()"
    command = BatteryCommand([sys.executable, "-c", pause], clock)
    command.latest()
    process = command._process
    assert process is not None
    clock.now = COMMAND_SECONDS
    assert command.latest() == Battery()
    assert process.returncode is not None


def test_a_battery_command_that_is_not_there() -> None:
    assert BatteryCommand(["/nowhere/battery"]).latest() == Battery()
