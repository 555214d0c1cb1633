"""Which addresses of this device are worth telling others: real interfaces only."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence

import psutil

# Container bridges and VPNs: peers on the Wi-Fi cannot reach these addresses.
_VIRTUAL = re.compile(
    r"(docker|veth|br-|virbr|vnet|lxc|lxd|podman|cni|flannel|cali|kube|tun|tap|wg|tailscale|zt|"
    r"utun|ipsec|ppp|vmnet|vboxnet|dummy|awdl|llw|anpi|rmnet)",
    re.IGNORECASE,
)
ANY_HOSTS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound


def usable_addresses(hosts: Sequence[str]) -> tuple[str, ...]:
    """Addresses to announce for what the daemon listens on (`--host`), in a stable order.

    Listening everywhere gives the IPv4 addresses of real interfaces that are up (with `::`
    their IPv6 ones too), and loopback only if there is nothing else.
    """
    fixed = tuple(host for host in hosts if host not in ANY_HOSTS)
    if fixed:
        return fixed
    return choose_addresses(_interface_addresses(), ipv6="::" in hosts)


def interface_names(addresses: Iterable[str]) -> dict[str, str]:
    """The interface of each of these addresses of this device; empty where that is not told."""
    names = {text: interface for interface, text in _interface_addresses()}
    return {address: names.get(address, "") for address in addresses}


def choose_addresses(found: Iterable[tuple[str, str]], *, ipv6: bool = False) -> tuple[str, ...]:
    """Of (interface, address) pairs the usable addresses: IPv4 first, each kind sorted."""
    real: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    loopback: list[str] = []
    for interface, text in found:
        address = ipaddress.ip_address(text)
        if address.is_loopback and address.version == 4:
            loopback.append(text)
        elif _is_usable(interface, address) and (ipv6 or address.version == 4):
            real.append(address)
    ordered = sorted(set(real), key=lambda a: (a.version, int(a)))
    return tuple(map(str, ordered)) or tuple(sorted(set(loopback)))


def _is_usable(interface: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        return False
    if address.version == 6 and address.is_link_local:
        return False  # useless to others without their own interface's index
    return _VIRTUAL.match(interface) is None


def _interface_addresses() -> list[tuple[str, str]]:
    try:
        up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    except OSError:  # Android denies it
        up = set()
    return [
        (interface, entry.address.partition("%")[0])
        for interface, entries in psutil.net_if_addrs().items()
        if not up or interface in up
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
