"""A LAN on one machine: a network namespace per host, joined by veth pairs to a bridge.

The bridge has a namespace of its own, so nothing reaches a real interface. Needs root.
Cutting and shaping work on the links; everything is removed at the end.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

INTERFACE = "eth0"
COMMAND_SECONDS = 20.0
# At most 100 ms of queue. After a pause a burst passes unhindered: with 256 KB a tensor of 400 KB
# went at 131 Mbit/s over a link of 50, with 16 KB at 50 (and long transfers no slower, up to 200).
_SHAPING = ("burst", "16kb", "latency", "100ms")


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace with the interface `eth0` and an address on the LAN."""

    name: str
    address: str
    port_name: str  # of its end at the bridge

    @property
    def prefix(self) -> tuple[str, ...]:
        """In front of a command line: run it on this host."""
        return ("ip", "netns", "exec", self.name)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on this host; the caller ends it."""
        return subprocess.Popen([*self.prefix, *argv], **options)


class Lan:
    """`with Lan(3, mbit=50) as lan:` gives `lan.hosts`, whose links have that rate each way. What
    one host sends another arrives `delay_ms` later.
    """

    def __init__(self, count: int, mbit: float | None = None, delay_ms: float = 0.0) -> None:
        name = f"cf{os.getpid() % 100_000}x{secrets.token_hex(2)}"
        self.hosts = tuple(
            Host(f"{name}-{i}", f"10.77.0.{i + 1}", f"port{i}") for i in range(count)
        )
        self._switch = f"{name}-lan"
        self._mbit, self._delay_ms = mbit, delay_ms
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_rate(self, mbit: float | None) -> None:
        """Shape every link to a rate each way; None lets them run free."""
        for host in self.hosts:
            for namespace, device in ((host.name, INTERFACE), (self._switch, host.port_name)):
                _tc(namespace, device, mbit)

    def cut(self, host: Host) -> None:
        """Take a host off the LAN: its link goes down."""
        _ip("-n", self._switch, "link", "set", host.port_name, "down")

    def heal(self, host: Host) -> None:
        """Bring a host that was cut off back."""
        _ip("-n", self._switch, "link", "set", host.port_name, "up")

    def split(self, others: Sequence[Host]) -> None:
        """Two LANs that do not reach each other: these hosts on one, the rest on the other."""
        _ip("-n", self._switch, "link", "add", "lan1", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", "lan1", "up")
        for host in others:
            _ip("-n", self._switch, "link", "set", host.port_name, "master", "lan1")

    def join(self) -> None:
        """One LAN again."""
        for host in self.hosts:
            _ip("-n", self._switch, "link", "set", host.port_name, "master", "lan0")
        _ip("-n", self._switch, "link", "delete", "lan1")

    def filter_multicast(self) -> None:
        """As an access point with client isolation of multicast: none reaches another host."""
        for host in self.hosts:
            _ip(
                *("-n", self._switch, "link", "set", host.port_name),
                *("type", "bridge_slave", "mcast_flood", "off"),
            )

    def block_port(self, host: Host, port: int) -> None:
        """As a firewall on the host: it answers nothing on a TCP port of its own."""
        _ip("-n", host.name, "rule", "add", "ipproto", "tcp", "sport", str(port), "blackhole")

    def add_interface(self, host: Host, name: str, address: str) -> None:
        """One more interface of a host, on a network where nobody else is."""
        end = f"{name}end"
        _ip("-n", host.name, "link", "add", name, "type", "veth", "peer", "name", end)
        _ip("-n", host.name, "address", "add", f"{address}/24", "dev", name)
        for interface in (name, end):
            _ip("-n", host.name, "link", "set", interface, "up")

    def close(self) -> None:
        """Delete the namespaces, and with them their links. May be called again."""
        if self._relay is not None:
            self._relay.communicate()  # its standard input ends, and so does it
            self._relay = None
        for namespace in (self._switch, *(host.name for host in self.hosts)):
            subprocess.run(
                ["ip", "netns", "delete", namespace],
                capture_output=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )

    def _build(self) -> None:
        switch = self._switch
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "lan0", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", switch, "link", "set", "lan0", "up")
        for host in self.hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        if self._delay_ms:
            self._start_relay()
        for host in self.hosts:
            self._plug_in(host)
        if self._mbit is not None:
            self.set_rate(self._mbit)

    def _plug_in(self, host: Host) -> None:
        switch, port = self._switch, host.port_name
        if self._relay is None:
            _ip(
                *("-n", switch, "link", "add", port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", host.name),
            )
        _ip("-n", switch, "link", "set", port, "master", "lan0", "up")
        _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        _ip("-n", host.name, "link", "set", INTERFACE, "up")

    def _start_relay(self) -> None:
        """Two cables lie between two hosts, each with half of the delay."""
        pairs = [f"{h.name}/{INTERFACE}={self._switch}/{h.port_name}" for h in self.hosts]
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "tests.lan.relay", str(self._delay_ms / 2000), *pairs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise RuntimeError("the relay did not start")


def _tc(namespace: str, device: str, mbit: float | None) -> None:
    act = ["tc", "-n", namespace, "qdisc"]
    subprocess.run(
        [*act, "delete", "dev", device, "root"],
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if mbit is not None:
        _run([*act, "add", "dev", device, "root", "tbf", "rate", f"{mbit}mbit", *_SHAPING])


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
