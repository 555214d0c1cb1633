"""mDNS itself across network namespaces: finding, losing, and a link that comes and goes."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lan.namespaces import Host, Lan

pytestmark = pytest.mark.lan

WAIT_SECONDS = 30.0
ROOT = Path(__file__).resolve().parents[2]


class Node:
    """One discovery process, its output read by a thread."""

    def __init__(self, host: Host, letter: str) -> None:
        self._events: queue.Queue[dict[str, object]] = queue.Queue()
        self._process = host.popen(
            [sys.executable, "-m", "tests.lan.mdns_node", letter, "7480"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def found(self, names: set[str]) -> dict[str, object]:
        """The addresses of these devices, once all are found."""
        addresses: dict[str, object] = {}
        while set(addresses) != names:
            event = self._events.get(timeout=WAIT_SECONDS)
            assert event["event"] == "found"
            addresses[str(event["name"])] = event["addresses"]
        return addresses

    def wait_for(self, event: str, name: str) -> None:
        """Read on until the next event of that kind about that device."""
        limit = time.monotonic() + WAIT_SECONDS
        while True:
            found = self._events.get(timeout=max(0.0, limit - time.monotonic()))
            if (found["event"], found["name"]) == (event, name):
                return

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._events.put(json.loads(line))


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan(3, mbit=50) as found:
        yield found


def test_devices_find_each_other_and_notice_who_leaves_and_returns(lan: Lan) -> None:
    nodes = [Node(host, letter) for host, letter in zip(lan.hosts, "abc", strict=True)]
    try:
        for node, own in zip(nodes, "abc", strict=True):
            expected = {
                f"device {letter}": [host.address]
                for host, letter in zip(lan.hosts, "abc", strict=True)
                if letter != own
            }
            assert node.found(set(expected)) == expected
        nodes[2].stop()
        nodes[0].wait_for("lost", "device c")
        lan.cut(lan.hosts[1])
        nodes[1].wait_for("lost", "device a")  # it saw its own link go and began anew
        lan.heal(lan.hosts[1])
        nodes[1].wait_for("found", "device a")
    finally:
        for node in nodes:
            node.stop()
