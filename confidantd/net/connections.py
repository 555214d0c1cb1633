"""The open connections of this device, one per peer, and who wants to hear of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from confidantd.ids import DeviceId
from confidantd.net.connection import Connection
from confidantd.net.dialer import bracketed
from confidantd.net.duplicates import InstanceLog, replaces
from confidantd.wire.messages import clean_name

_log = logging.getLogger(__name__)

DeviceListener = Callable[[DeviceId], None]
TwinListener = Callable[[DeviceId, str], None]


class Connections:
    """`connected`, `disconnected` and `twins` are lists of listeners to append to.

    `connected` and `disconnected` alternate for each device; `twins` hears the id of a peer
    whose identity two running daemons use, and the address of the one not connected.
    """

    def __init__(self) -> None:
        self.connected: list[DeviceListener] = []
        self.disconnected: list[DeviceListener] = []
        self.twins: list[TwinListener] = []
        self._open: dict[DeviceId, Connection] = {}
        self._instances = InstanceLog()

    def get(self, device: DeviceId) -> Connection | None:
        """The connection to a device."""
        return self._open.get(device)

    def devices(self) -> set[DeviceId]:
        """Those that have a connection."""
        return set(self._open)

    def admit(self, new: Connection) -> None:
        """Take a greeted connection in; of two for one device the better one is kept."""
        device = new.peer.device
        old = self._open.get(device)
        if old is not None and old.origin.instance != new.origin.instance:
            old.close("the device started anew")
            self.remove(old)
            old = None
        if old is not None and not replaces(old.origin, new.origin):
            new.retire()
            return
        self._open[device] = new
        if old is not None:
            old.retire()
            return
        _log.info("connected to %s at %s", clean_name(new.peer.name), new.host)
        for listener in self.connected:
            listener(device)
        self._check_twins(new)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended. May be called again."""
        device = connection.peer.device
        if self._open.get(device) is not connection:
            return
        del self._open[device]
        _log.info("disconnected from %s: %s", clean_name(connection.peer.name), connection.reason)
        for listener in self.disconnected:
            listener(device)

    def end(self, device: DeviceId, reason: str) -> None:
        """Close the connection to a device, if there is one."""
        connection = self._open.get(device)
        if connection is not None:
            connection.close(reason)
            self.remove(connection)

    def close_all(self, reason: str) -> None:
        """Close every connection; each is removed when it has ended."""
        for connection in list(self._open.values()):
            connection.close(reason)

    def _check_twins(self, new: Connection) -> None:
        address = f"{bracketed(new.host)}:{new.peer.port}"
        other = self._instances.twin(new.peer.device, new.peer.instance, address)
        if other is not None:
            for listener in self.twins:
                listener(new.peer.device, other)
