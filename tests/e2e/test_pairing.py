"""Pairing as a person does it: two daemons that know nobody, and their command lines."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.devices import Device, met, wait_until

MEET_SECONDS = 30.0


@contextlib.contextmanager
def strangers(folder: Path, *names: str) -> Iterator[list[Device]]:
    """Daemons without a member, started, that hear no mDNS."""
    devices = [Device(folder / name, name, "--no-mdns") for name in names]
    try:
        for device in devices:
            device.start()
        yield devices
    finally:
        for device in devices:
            if device.process is not None:
                device.stop()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Device]]:
    """Two strangers."""
    with strangers(tmp_path, "anna", "ben") as devices:
        yield devices


def test_a_code_pairs_two_devices_and_each_shows_the_other(two: list[Device]) -> None:
    anna, ben = two
    with subprocess.Popen(
        anna.cli_command("invite"), stdout=subprocess.PIPE, text=True, env=anna.environment()
    ) as inviting:
        assert inviting.stdout is not None
        said = ""
        while "--at" not in said:
            line = inviting.stdout.readline()
            assert line, said
            said += line
        found = re.search(r"confidant join ([\d-]+) --at (\S+)", said)
        assert found is not None, said
        done = ben.cli("join", found[1], "--at", found[2])
        said += inviting.stdout.read()
    assert done.returncode == 0, done.stderr
    assert inviting.returncode == 0, said
    short = {d.name: d.json("status")["device"]["short_id"] for d in two}
    for output, own, other in ((said, "anna", "ben"), (done.stdout, "ben", "anna")):
        line = output.splitlines()[-1]
        assert f"paired with {other} ({short[other]})" in line
        assert short[own] in line
    wait_until(lambda: met(two), MEET_SECONDS, "both alive with one coordinator")


def test_a_wrong_code_is_one_line_and_pairs_nobody(two: list[Device]) -> None:
    anna, ben = two
    shown = anna.json("invite")
    assert shown.keys() >= {"code", "expires_at"}
    digit = str((int(shown["code"][-1]) + 1) % 10)
    done = ben.cli("join", shown["code"][:-1] + digit, "--at", shown["address"])
    assert done.returncode == 1
    assert done.stderr.startswith("confidant: the code is wrong")
    assert len(done.stderr.splitlines()) == 1
    for device in two:
        assert len(device.json("members")["members"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["join", "123"], "a code is nine digits"),
        (["join", "123-456-789", "--at", "nowhere"], "is not an address"),
        (["join", "123-456-789", "--at", "127.0.0.1:1"], "127.0.0.1:1"),
        (["leave"], "paired with nobody"),
    ],
)
def test_what_cannot_be_is_one_line(two: list[Device], arguments: list[str], said: str) -> None:
    done = two[0].cli(*arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_removed_on_one_device_is_removed_on_all(tmp_path: Path) -> None:
    with strangers(tmp_path, "anna", "ben", "cleo") as devices:
        anna, ben, cleo = devices
        for joiner in (ben, cleo):
            shown = anna.json("invite")
            assert joiner.json("join", shown["code"], "--at", shown["address"])["name"] == "anna"
        wait_until(lambda: met(devices), MEET_SECONDS, "all three met, though two never paired")
        assert ben.cli("remove", "cleo").returncode == 0

        def members(device: Device) -> set[str]:
            return {m["name"] for m in device.json("members")["members"] if not m["self"]}

        wait_until(lambda: members(anna) == {"ben"}, MEET_SECONDS, "anna heard of it")
        wait_until(lambda: members(cleo) == set(), MEET_SECONDS, "so did cleo")
        assert members(ben) == {"anna"}
        assert anna.json("leave")["left_members"] == 1
        wait_until(lambda: members(ben) == set(), MEET_SECONDS, "ben is alone")
