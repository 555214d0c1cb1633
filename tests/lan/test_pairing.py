"""Pairing on a LAN: the code alone is enough, mDNS finds the inviter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.devices import Device, met, wait_until
from tests.lan.namespaces import Lan

pytestmark = pytest.mark.lan

MEET_SECONDS = 30.0


def test_the_code_alone_finds_the_inviter(tmp_path: Path) -> None:
    with Lan(3) as lan:
        devices = [
            Device(tmp_path / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(("anna", "ben", "cleo"), lan.hosts, strict=True)
        ]
        try:
            for device in devices:
                device.start()
            for inviter, joiner in ((0, 1), (1, 2)):
                shown = devices[inviter].json("invite")
                joined = devices[joiner].json("join", shown["code"])
                assert joined["name"] == devices[inviter].name
            wait_until(lambda: met(devices), MEET_SECONDS, "all three are one swarm")
        finally:
            for device in devices:
                if device.process is not None:
                    device.stop()
