"""The daemon as a service: it tells systemd when it is ready, and the JSON is the contract's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import reference
from tests.e2e.devices import Device, swarm
from tests.e2e.small_models import TEXT, Small, make_small

NOTIFY_SECONDS = 20.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama."""
    return make_small("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Two daemons that all tests of this module share."""
    with swarm(tmp_path_factory.mktemp("swarm"), 2) as found:
        yield found


def test_systemd_hears_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(NOTIFY_SECONDS)
        device = Device(
            tmp_path / "home", "unit", prefix=("env", f"NOTIFY_SOCKET={address}")
        ).start()
        assert manager.recv(100) == b"READY=1"
        assert device.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_status_and_peers_have_the_keys_of_the_contract(devices: list[Device]) -> None:
    status = devices[0].json("status")
    assert {
        "device", "version", "address", "swarm", "coordinator", "memory", "jobs",
    } <= set(status)  # fmt: skip
    assert set(status["device"]) == {"id", "short_id", "name"}
    assert set(status["swarm"]) == {"tag", "members"}
    assert set(status["coordinator"]) == {"id", "name", "term"}
    assert set(status["memory"]) == {"total_bytes", "available_bytes", "granted_bytes"}
    assert status["swarm"]["members"] == 2
    assert status["swarm"]["tag"] == devices[1].json("status")["swarm"]["tag"]
    peers = devices[0].json("peers")["peers"]
    assert [peer["name"] for peer in peers if peer.get("self")] == ["anna"]
    for peer in peers:
        assert {
            "id", "name", "state", "address", "round_trip_ms", "bandwidth_mbps", "memory_bytes",
            "backends", "roles", "power",
        } <= set(peer)  # fmt: skip


def test_a_plan_has_the_keys_of_the_contract(devices: list[Device], small: Small) -> None:
    for objective in ("--train", "--generate"):
        plan = devices[0].json("plan", str(small.folder), objective, "--devices", "anna,ben")
        assert {"model", "objective", "stages", "links", "left_out", "predicted"} <= set(plan)
        assert plan["stages"][0]["layers"][0] == 0
        assert plan["stages"][-1]["layers"][1] == 3
        assert plan["stages"][0]["embedding"]
        assert plan["stages"][-1]["head"]
        for stage in plan["stages"]:
            assert {"device", "name", "memory_bytes", "seconds", "backends"} <= set(stage)
        assert len(plan["links"]) == 1
        assert plan["predicted"]["step_seconds"] > 0
    assert devices[0].json("jobs") == {"jobs": []}, "a plan starts nothing"


def test_tables_fit_eighty_columns(devices: list[Device], small: Small) -> None:
    for command in (
        ("status",), ("peers",), ("jobs",), ("doctor",), ("members",),
        ("plan", str(small.folder), "--devices", "anna,ben"),
    ):  # fmt: skip
        done = devices[0].cli(*command)
        assert done.returncode == 0, done.stderr
        assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 80, done.stdout


def test_generation_with_an_adapter(devices: list[Device], small: Small, tmp_path: Path) -> None:
    adapter = tmp_path / "out"
    events = devices[0].events(
        "train", str(small.folder), "--data", str(TEXT), "--output", str(adapter),
        "--method", "lora", "--rank", "4", "--steps", "5", "--batch-size", "4",
        "--microbatches", "2", "--sequence-length", "64", "--learning-rate", "1e-2",
        "--devices", "anna,ben",
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    model = reference.with_adapter(reference.load(small.folder), adapter)
    ids = small.encode(small.prompt)
    expected = reference.greedy(model, ids, 24)
    answer = devices[1].json(
        "generate", str(small.folder), "--prompt", small.prompt, "--adapter", str(adapter),
        "--max-new-tokens", "24", "--devices", "anna,ben",
    )  # fmt: skip
    assert answer["tokens"] == expected
    assert expected != reference.greedy(reference.load(small.folder), ids, 24)


def test_sampling_repeats_with_its_seed(devices: list[Device], small: Small) -> None:
    def sample(seed: int) -> list[int]:
        answer = devices[0].json(
            "generate", str(small.folder), "--prompt", small.prompt, "--max-new-tokens", "12",
            "--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed),
        )  # fmt: skip
        return list(answer["tokens"])

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)


def test_streamed_text_is_the_text_of_the_json(devices: list[Device], small: Small) -> None:
    command = ("generate", str(small.folder), "--prompt", small.prompt, "--max-new-tokens", "16")
    printed = devices[0].cli(*command)
    assert printed.returncode == 0, printed.stderr
    text = devices[0].json(*command)["text"]
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    assert printed.stdout.rstrip("\n") == kept.rstrip("\n")
