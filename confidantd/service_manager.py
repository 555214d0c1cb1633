"""Tells systemd how the daemon is: the notify protocol (sd_notify(3)), one datagram a message."""

from __future__ import annotations

import os
import socket

SOCKET_VARIABLE = "NOTIFY_SOCKET"


def notify_ready() -> None:
    """The daemon serves."""
    _notify("READY=1")


def notify_stopping() -> None:
    """The daemon was asked to end."""
    _notify("STOPPING=1")


def _notify(message: str) -> None:
    """Send to the service manager, if there is one; a service manager that is gone is no error."""
    address = os.environ.get(SOCKET_VARIABLE, "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall(message.encode())
        except OSError:
            return
