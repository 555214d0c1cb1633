"""`confidant doctor` names why devices do not see each other; they still meet where they can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.devices import Device, met, pair, wait_until
from tests.lan.namespaces import Lan

pytestmark = pytest.mark.lan

SEEN_SECONDS = 40.0
PORT = 7480


@contextlib.contextmanager
def started(devices: Sequence[Device]) -> Iterator[None]:
    """Daemons that run meanwhile."""
    try:
        for device in devices:
            device.start()
        yield
    finally:
        for device in devices:
            if device.process is not None:
                device.stop()


def two(folder: Path, lan: Lan, *options: str, host: str = "") -> list[Device]:
    """A device on each of two hosts, at the usual port."""
    return [
        Device(folder / name, name, "--port", str(PORT), *options, prefix=there.prefix,
               host=host or there.address)
        for name, there in zip(("anna", "ben"), lan.hosts, strict=True)
    ]  # fmt: skip


def says(device: Device, name: str, message: str, hint: str, state: str) -> None:
    """Wait until a line of doctor says so."""

    def found() -> bool:
        lines = [c for c in device.json("doctor")["checks"] if c["name"] == name]
        return any(
            message in line["message"] and hint in line["hint"] and line["state"] == state
            for line in lines
        )

    wait_until(found, SEEN_SECONDS, f"{name}: {message} {device.json('doctor')['checks']}")


def test_multicast_is_filtered_and_join_at_connects_all_the_same(tmp_path: Path) -> None:
    with Lan(2) as lan:
        lan.filter_multicast()
        anna, ben = devices = two(tmp_path, lan)
        with started(devices):
            shown = anna.json("invite")
            ben.json("join", shown["code"], "--at", shown["address"])
            wait_until(lambda: met(devices), SEEN_SECONDS, "met without multicast")
            for device, other in ((anna, "ben"), (ben, "anna")):
                says(device, "multicast", f"no announcement of {other} arrives", "--peer", "warn")
                says(device, "multicast", "multicast is filtered", "isolation", "warn")


def test_a_firewall_lets_connections_out_but_not_in(tmp_path: Path) -> None:
    with Lan(2) as lan:
        lan.block_port(lan.hosts[1], PORT)
        anna, ben = devices = two(tmp_path, lan)
        pair(devices)
        with started(devices):
            wait_until(lambda: met(devices), SEEN_SECONDS, "ben reaches anna")
            said = "anna cannot connect to this device (no answer"
            says(ben, "incoming", said, f"allow TCP port {PORT}", "fail")
            says(anna, "incoming", "ben can connect back", "", "ok")


def test_a_port_is_blocked_on_both(tmp_path: Path) -> None:
    with Lan(2) as lan:
        for host in lan.hosts:
            lan.block_port(host, PORT)
        anna, ben = devices = two(tmp_path, lan)
        pair(devices)
        with started(devices):
            for device, other in ((anna, "ben"), (ben, "anna")):
                said = f"{other} announces itself, but no connection to it opens"
                says(device, f"peer {other}", said, "client isolation", "fail")
                assert device.states() == {other: "gone"} or other not in device.states()


def test_nobody_is_there(tmp_path: Path) -> None:
    with Lan(2) as lan:
        anna, ben = two(tmp_path, lan)
        pair([anna, ben])
        with started([anna]):
            says(anna, "multicast", "no device is heard", "5353", "warn")
            line = next(c for c in anna.json("doctor")["checks"] if c["name"].startswith("peer "))
            assert "no address of" in line["message"]
            assert "--peer HOST:PORT" in line["hint"]
            assert ben.process is None


def test_a_second_interface_leads_nowhere(tmp_path: Path) -> None:
    with Lan(2) as lan:
        lan.add_interface(lan.hosts[0], "eth1", "172.30.0.5")
        anna, ben = devices = two(tmp_path, lan, host="0.0.0.0")
        pair(devices)
        with started(devices):
            wait_until(lambda: met(devices), SEEN_SECONDS, "met by the interface that works")
            said = f"ben cannot reach this device at 172.30.0.5:{PORT} (eth1"
            says(anna, "incoming", said, f"--host {lan.hosts[0].address}", "warn")
            says(ben, "incoming", "anna can connect back", "", "ok")


def test_two_releases(tmp_path: Path) -> None:
    other = tmp_path / "other-release"
    other.mkdir()
    (other / "sitecustomize.py").write_text(
        "import confidantd.wire.messages as messages\nmessages.PROTOCOL_VERSION = 99\n"
    )
    with Lan(2) as lan:
        anna, ben = devices = two(tmp_path, lan)
        ben.settings["PYTHONPATH"] = str(other)
        pair(devices)
        with started(devices):
            says(anna, "peer ben", "protocol 99", "same release", "fail")
            says(ben, "peer anna", "protocol 99", "same release", "fail")
