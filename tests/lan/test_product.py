"""The product on a LAN of network namespaces: real mDNS, shaped links, killed daemons."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import reference
from tests.e2e.devices import Device, make_identity, met, pair, wait_until
from tests.e2e.small_models import make_small
from tests.lan.namespaces import Lan

pytestmark = pytest.mark.lan

NAMES = ("anna", "ben", "cleo")
MBIT = 50.0
MEASURE_SECONDS = 30.0
SEE_SECONDS = 5.0
ELECT_SECONDS = 5.0
# A daemon takes a second or two to start on a loaded machine, and asking costs a CLI start;
# what the product promises is measured by the benchmark, here it must just not hang.
NOISE_SECONDS = 15.0


def links_are_measured(device: Device) -> bool:
    """Whether a device shows what its links were shaped to."""
    peers = [peer for peer in device.json("peers")["peers"] if not peer["self"]]
    found = [peer["bandwidth_mbps"] for peer in peers if peer["state"] == "alive"]
    return None not in found and found == pytest.approx([MBIT] * len(found), rel=0.2)


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Four hosts joined by 50 Mbit/s links."""
    with Lan(4, mbit=MBIT) as found:
        yield found


def on(lan: Lan, index: int, folder: Path, name: str) -> Device:
    """A device on one host of the LAN; it finds the others by mDNS alone."""
    host = lan.hosts[index]
    return Device(folder / name, name, prefix=host.prefix, host=host.address)


@pytest.fixture
def devices(lan: Lan, tmp_path: Path) -> Iterator[list[Device]]:
    """Three paired devices, started."""
    found = [on(lan, i, tmp_path, name) for i, name in enumerate(NAMES)]
    pair(found)
    try:
        for device in found:
            device.start()
        yield found
    finally:
        for device in found:
            if device.process is not None and device.process.poll() is None:
                device.stop()


def test_devices_meet_elect_and_elect_again(devices: list[Device]) -> None:
    wait_until(lambda: met(devices), SEE_SECONDS + ELECT_SECONDS + NOISE_SECONDS, "all met")
    name = devices[0].coordinator()
    term = devices[0].json("status")["coordinator"]["term"]
    lost = next(device for device in devices if device.name == name)
    lost.kill()
    left = [device for device in devices if device is not lost]

    def elected() -> bool:
        found = {device.coordinator() for device in left}
        return len(found) == 1 and found <= {device.name for device in left}

    wait_until(elected, ELECT_SECONDS + NOISE_SECONDS, "the same new coordinator on both")
    for device in left:
        assert device.json("status")["coordinator"]["term"] > term
        assert device.states()[lost.name] in ("suspect", "gone")


def test_a_stranger_gets_no_further_than_the_handshake(
    lan: Lan, devices: list[Device], tmp_path: Path
) -> None:
    stranger = on(lan, 3, tmp_path, "stranger")
    make_identity(stranger)
    stranger.start()
    try:
        wait_until(lambda: met(devices[:3]) or True, NOISE_SECONDS, "started")
        for device in devices:
            wait_until(
                lambda d=device: d.states().get("stranger") == "unpaired",
                SEE_SECONDS + NOISE_SECONDS,
                "the stranger is listed as unpaired",
            )
        address = devices[0].json("status")["address"]
        done = subprocess.run(
            [*stranger.prefix, stranger.python, "-c", _KNOCK, address, str(stranger.home)],
            capture_output=True, text=True, timeout=30, check=False,
            env=stranger.environment(),
        )  # fmt: skip
        assert "refused by the handshake" in done.stdout, done.stdout + done.stderr
        assert set(stranger.states().values()) <= {"unpaired"}
    finally:
        stranger.stop()


# Knocks with a valid certificate that nobody trusts: the first read must fail.
_KNOCK = """
import socket, ssl, sys
host, _, port = sys.argv[1].rpartition(":")
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
identity = sys.argv[2] + "/identity/"
context.load_cert_chain(identity + "certificate.pem", identity + "key.pem")
try:
    with socket.create_connection((host, int(port)), 5) as raw:
        with context.wrap_socket(raw) as tls:
            tls.sendall(b"GET /v1/control HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            print("answered", tls.recv(100))
except ssl.SSLError as failure:
    print("refused by the handshake", failure)
except ConnectionError as failure:
    print("refused by the handshake", failure)
"""


def test_training_across_the_lan(lan: Lan, devices: list[Device], tmp_path: Path) -> None:
    small = make_small("llama", tmp_path / "llama")
    wait_until(lambda: met(devices), SEE_SECONDS + ELECT_SECONDS + NOISE_SECONDS, "all met")
    events = devices[0].events(
        "train", str(small.folder), "--data", str(small.text), "--output", str(tmp_path / "out"),
        "--steps", "5", "--batch-size", "4", "--sequence-length", "64", "--no-shuffle",
        "--learning-rate", "1e-3", "--warmup-steps", "0", "--devices", ",".join(NAMES),
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    run = reference.train(
        reference.load(small.folder), reference.blocks_of(small.folder, [small.text], 64),
        steps=5, batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    wait_until(lambda: all(map(links_are_measured, devices)), MEASURE_SECONDS, "links measured")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses == pytest.approx(run.losses, rel=1e-4)
