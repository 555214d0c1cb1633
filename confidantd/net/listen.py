"""Listening sockets: the port that was asked for, the one used before, or a free one."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from pathlib import Path

from confidantd.errors import ConfigError, PortTakenError
from confidantd.identity.files import write_private_file

DEFAULT_PORT = 7480
PORT_FILE = "port"
BACKLOG = 64


def open_listeners(hosts: Sequence[str], port: int | None, home: Path) -> list[socket.socket]:
    """One non-blocking listening socket per host, all on one port. Blocks (reads a file).

    A `port` given is taken or `PortTakenError` raised. None: the port remembered in `home`
    if it is free, else 7480 if free, else any; what it became is remembered.
    """
    if port is not None:
        return _open(hosts, port)
    remembered = _remembered(home)
    for candidate in dict.fromkeys((remembered, DEFAULT_PORT, 0)):
        if candidate is None:
            continue
        try:
            listeners = _open(hosts, candidate)
        except PortTakenError:
            continue
        chosen = bound_port(listeners)
        if chosen != remembered:
            write_private_file(home / PORT_FILE, f"{chosen}\n".encode())
        return listeners
    raise PortTakenError("no free port was found", "choose one with --port")


def open_any(hosts: Sequence[str]) -> list[socket.socket]:
    """One non-blocking listening socket per host, all on one free port."""
    return _open(hosts, 0)


def bound_port(listeners: Sequence[socket.socket]) -> int:
    """The port that the sockets of `open_listeners` share."""
    return int(listeners[0].getsockname()[1])


def _open(hosts: Sequence[str], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for host in hosts:
            listeners.append(_listener(host, port))
            port = bound_port(listeners)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            raise PortTakenError(
                f"port {port} on {host} is in use", "choose another one with --port"
            ) from None
        if failure.errno == errno.EACCES:
            raise PortTakenError(
                f"port {port} may not be used without privileges", "choose one above 1023"
            ) from None
        raise ConfigError(
            f"this device cannot listen on {host} ({failure.strerror or failure})",
            "give --host an address of this device",
        ) from None
    listener.setblocking(False)
    return listener


def _remembered(home: Path) -> int | None:
    try:
        port = int((home / PORT_FILE).read_text(encoding="ascii")[:8])
    except (OSError, ValueError):
        return None
    return port if 0 < port < 65_536 else None
