"""A stranger on the Wi-Fi with the source code and a capture of all traffic, and a rogue member.

Each attack is performed, from a host of its own, on daemons that pair and train meanwhile.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from confidantd.identity.certificate import load_or_create
from confidantd.swarm.pairing import MAX_WRONG
from tests.e2e.devices import Device, met, wait_until
from tests.e2e.small_models import TEXT, Small, make_small
from tests.e2e.test_jobs import record, wait_for_no_workers, wait_for_steps, workers
from tests.lan.namespaces import Host, Lan

pytestmark = pytest.mark.lan

MEET_SECONDS = 30.0
ANNA, BEN, MALLORY = range(3)
OWN_TOPICS = ("stage.stop", "stage.command", "stage.start", "stage.offer", "stage.withdraw")


@dataclass
class Scene:
    """Two devices that paired by a code while everything was recorded, and a third host."""

    devices: list[Device]
    rogue: Host
    folder: Path
    recording: Path
    code: str
    pairing_port: int
    small: Small
    job: str
    intruder: Path  # home of a member that was let in before the job began

    @property
    def address(self) -> tuple[str, str]:
        """Where anna's daemon listens."""
        host, _, port = self.devices[ANNA].json("status")["address"].rpartition(":")
        return host, port

    def attack(self, kind: str, *arguments: str, at: tuple[str, str] | None = None) -> Any:
        """What an attack from the third host got."""
        command = [
            *self.rogue.prefix, sys.executable, "-m", "tests.lan.attacker", kind,
            *(at or self.address), *arguments,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def home(self, name: str) -> str:
        """A home for the attacker, with an identity."""
        load_or_create(self.folder / name)
        return str(self.folder / name)

    def pair(self, name: str) -> str:
        """A home whose device anna let in: a member that turns out to be hostile."""
        return str(join_from(self.rogue, self.folder / name, self.devices[ANNA]))

    def members(self) -> set[str]:
        """Ids of whom anna trusts."""
        return {m["id"] for m in self.devices[ANNA].json("members")["members"]}

    def packets(self) -> bytes:
        """All that passed anna's end of the network so far."""
        return self.recording.read_bytes()


def join_from(host: Host, home: Path, inviter: Device) -> Path:
    """A new device on a host joins by a code; gives its home."""
    shown = inviter.json("invite")
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from confidantd.identity.certificate import load_or_create\n"
        "from confidantd.identity.trust import TrustStore\n"
        "from confidantd.swarm.joining import join\n"
        "from confidantd.swarm.pairing import read_code\n"
        "from confidantd.wire.pairing import Card\n"
        "home, code, at = sys.argv[1:]\n"
        "me = load_or_create(Path(home))\n"
        "host, _, port = at.rpartition(':')\n"
        "card = Card(me.certificate_pem, 'mallory', 9)\n"
        "asyncio.run(join(TrustStore(me.home), read_code(code), host, int(port), card))\n"
    )
    command = [*host.prefix, sys.executable, "-c", script]
    command += [str(home), shown["code"], shown["address"]]
    subprocess.run(command, check=True, timeout=60)
    return home


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Pairing, and an endless job over both devices."""
    folder = tmp_path_factory.mktemp("attacks")
    small = make_small("llama", folder / "model")
    with Lan(3) as lan:
        recording = folder / "packets"
        switch = lan.hosts[ANNA].name.rpartition("-")[0] + "-lan"
        tap = subprocess.Popen(
            ["ip", "netns", "exec", switch, sys.executable, "-m", "tests.lan.attacker", "capture",
             lan.hosts[ANNA].port_name, str(recording)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(("anna", "ben"), lan.hosts[:2], strict=True)
        ]
        try:
            assert tap.stdout is not None
            assert tap.stdout.readline() == "ready\n"
            for device in devices:
                device.start()
            anna, ben = devices
            shown = anna.json("invite")
            ben.json("join", shown["code"])
            wait_until(lambda: met(devices), MEET_SECONDS, "paired")
            intruder = join_from(lan.hosts[MALLORY], folder / "intruder", anna)
            job = anna.json(
                "train", str(small.folder), "--data", str(TEXT), "--output", str(folder / "out"),
                "--steps", "100000", "--batch-size", "4", "--microbatches", "2",
                "--sequence-length", "64", "--detach", "--devices", "anna,ben",
            )["job"]  # fmt: skip
            wait_for_steps(anna, job)
            port = int(shown["address"].rpartition(":")[2])
            yield Scene(
                devices,
                lan.hosts[MALLORY],
                folder,
                recording,
                shown["code"],
                port,
                small,
                job,
                intruder,
            )
            assert record(anna, job)["state"] == "running", "no attack ended the job"
            anna.json("jobs", "cancel", job)
            wait_for_no_workers(*devices)
        finally:
            for device in devices:
                if device.process is not None:
                    device.stop()
            tap.terminate()
            tap.wait()
            if tap.stdout is not None:
                tap.stdout.close()


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("plain", "plaintext HTTP, and a WebSocket without TLS"),
        ("no_certificate", "a WebSocket over TLS without a certificate"),
        ("own_certificate", "a certificate made by the same code"),
        ("old_tls", "TLS 1.2"),
    ],
)
def test_a_stranger_gets_no_answer(scene: Scene, attack: str, why: str) -> None:
    arguments = [scene.home("stranger")] if attack == "own_certificate" else []
    found = scene.attack(attack, *arguments)
    assert "HTTP/1.1" not in found["heard"], why
    assert found["heard"] == "" or found["refused"]


def test_a_recorded_conversation_opens_nothing_again(scene: Scene) -> None:
    anna = scene.devices[ANNA]
    host, port = scene.address
    shown = anna.json("invite")
    new_port = shown["address"].rpartition(":")[2]
    before = scene.members()
    for recorded, target in ((scene.pairing_port, new_port), (int(port), port)):
        sent = client_bytes(scene.packets(), recorded)
        assert len(sent) > 200, "the conversation was recorded"
        file = scene.folder / "replay"
        file.write_bytes(sent)
        found = scene.attack("replay", str(file), at=(host, target))
        assert "HTTP/1.1" not in found["heard"]
    assert scene.members() == before
    assert anna.states()["ben"] == "alive"


def test_five_guesses_and_the_invitation_is_over(scene: Scene) -> None:
    anna = scene.devices[ANNA]
    shown = anna.json("invite")
    host, _, port = shown["address"].rpartition(":")
    secret = shown["code"].partition("-")[2].replace("-", "")
    assert int(secret) > MAX_WRONG, "one in 200,000 codes is among the first guesses: run it again"
    number, home = shown["code"].partition("-")[0], scene.home("guesser")
    found = scene.attack("guess", home, number, str(MAX_WRONG + 2), at=(host, port))
    assert found["tries"][:MAX_WRONG] == ["wrong-code"] * MAX_WRONG
    assert "wrong-code" not in found["tries"][MAX_WRONG:]
    assert found["members"] == []
    right = scene.devices[BEN].cli("join", shown["code"], "--at", shown["address"], "--merge")
    assert right.returncode == 1, "nor does the right code open it any more"


def test_a_member_is_nobody_else(scene: Scene) -> None:
    home = scene.pair("speaker")
    ben = scene.devices[BEN].json("status")["device"]["id"]
    found = scene.attack("speak_as", home, ben)
    assert found["refused"]
    assert scene.devices[ANNA].states()["ben"] == "alive"
    scene.devices[ANNA].json("remove", load_or_create(Path(home)).device_id)


def test_a_member_commands_nobody_else_s_stages(scene: Scene) -> None:
    home = scene.pair("commander")
    step = record(scene.devices[ANNA], scene.job)["step"]
    answers = scene.attack("command", home, scene.job, *OWN_TOPICS)
    assert answers == dict.fromkeys(OWN_TOPICS, "not-allowed")
    answer = scene.attack("command", home, scene.job, "device.speeds")
    assert answer == {"device.speeds": "protocol"}, "a member is answered, if only what is wrong"
    wait_until(
        lambda: record(scene.devices[ANNA], scene.job)["step"] > step, MEET_SECONDS, "it goes on"
    )
    scene.devices[ANNA].json("remove", load_or_create(Path(home)).device_id)


@pytest.mark.parametrize("epoch", ["0", "1", "2"])
def test_a_worker_speaks_to_those_of_its_plan_only(scene: Scene, epoch: str) -> None:
    home, anna = str(scene.intruder), scene.devices[ANNA]
    (worker,) = workers(anna)
    ports = listening_ports(worker.pid)
    step = record(anna, scene.job)["step"]
    for port in ports:
        found = scene.attack("frame", home, scene.job, epoch, at=(scene.address[0], str(port)))
        assert found["closed"]
        assert "hold the stage" in found["why"] or "epoch" in found["why"]
    assert ports
    wait_until(lambda: record(anna, scene.job)["step"] > step, MEET_SECONDS, "the job goes on")


def test_who_listens_learns_no_text_no_weights_and_no_code(scene: Scene) -> None:
    packets = scene.packets()
    digits = scene.code.replace("-", "")
    assert b"_confidant" in packets, "mDNS is readable: the tap works"
    assert digits.encode() not in packets
    assert scene.code.partition("-")[2].encode() not in packets
    assert scene.code.encode() not in packets
    text = TEXT.read_bytes()
    assert text[:40] not in packets
    weights = (scene.small.folder / "model.safetensors").read_bytes()
    tail = [weights[at : at + 32] for at in range(len(weights) // 2, len(weights) - 32, 4096)]
    assert not [piece for piece in tail if any(piece) and piece in packets]
    key = (scene.devices[ANNA].home / "identity" / "key.pem").read_text()
    body = "".join(re.findall(r"^[A-Za-z0-9+/=]{20,}$", key, re.MULTILINE))
    assert body
    assert body[:40].encode() not in packets


def listening_ports(pid: int) -> set[int]:
    """TCP ports (IPv4) that a process of another network namespace listens on."""
    links = (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    rows = (line.split() for line in table)
    listen = "0A"
    return {int(r[1].rpartition(":")[2], 16) for r in rows if r[3] == listen and r[9] in inodes}


def client_bytes(recording: bytes, port: int) -> bytes:
    """What the first client of a TCP port sent to it, in order."""
    pieces: dict[tuple[bytes, int], dict[int, bytes]] = {}
    at = 0
    while at + 4 <= len(recording):
        size = int.from_bytes(recording[at : at + 4], "big")
        packet, at = recording[at + 4 : at + 4 + size], at + 4 + size
        if packet[12:14] != b"\x08\x00" or packet[23] != 6:  # IPv4, TCP
            continue
        ip, header = packet[14:], (packet[14] & 15) * 4
        tcp = ip[header : int.from_bytes(ip[2:4], "big")]
        source, target, sequence = struct.unpack(">HHI", tcp[:8])
        payload = tcp[(tcp[12] >> 4) * 4 :]
        if target == port and payload:
            pieces.setdefault((ip[12:16], source), {})[sequence] = payload
    for conversation in pieces.values():
        return b"".join(conversation[sequence] for sequence in sorted(conversation))
    return b""
