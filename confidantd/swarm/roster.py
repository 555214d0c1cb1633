"""Members tell each other who belongs to the swarm: on meeting, and whenever that changes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from confidantd.errors import ConfidantError, ProtocolError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.net.network import Network
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.roster import MAX_ENTRIES, Roster, RosterEntry

_log = logging.getLogger(__name__)

ROSTER_TOPIC = "swarm.roster"
MAX_WAITING = 64  # rosters of peers that are not looked at yet


class RosterGossip:
    """Sends the roster and takes those of others, one after the other."""

    def __init__(self, network: Network, trust: TrustStore) -> None:
        self._network = network
        self._trust = trust
        self._me = network.identity.device_id
        self._came: deque[tuple[DeviceId, Roster]] = deque(maxlen=MAX_WAITING)
        self._told: tuple[RosterEntry, ...] = ()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        network.on_notify(ROSTER_TOPIC, self._roster_came)
        network.on_connected(self._connected)

    async def run(self) -> None:
        """Serve until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._trust.on_change(self._trust_changed)
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._take()
                self._tell_all()
        finally:
            self._trust.forget_listener(self._trust_changed)

    def say_removed(self, device: DeviceId) -> None:
        """Let a device know that it will be removed: what it is told when it is, nobody knows."""
        known = {entry.device: entry for entry in self._trust.entries()}
        change = known[device].change if device in known else 0
        self._send(device, (RosterEntry(device, change + 2 - change % 2),))

    def say_left(self) -> None:
        """Tell everybody that this device leaves the swarm."""
        known = {entry.device: entry for entry in self._trust.entries()}
        change = known[self._me].change if self._me in known else 1
        for device in self._network.connected():
            self._send(device, (RosterEntry(self._me, change + 2 - change % 2),))

    async def _take(self) -> None:
        while self._came:
            device, roster = self._came.popleft()
            if device not in self._trust.members():
                continue  # it was removed meanwhile
            try:
                # nobody vouches for itself: one that was removed would let itself in again
                vouched = [e for e in roster.entries if e.device != device or not e.member]
                await asyncio.to_thread(self._trust.merge, vouched)
            except ConfidantError as failure:
                _log.warning("the list of members could not be kept: %s", failure)

    def _tell_all(self) -> None:
        entries = self._trust.entries()
        if entries != self._told:
            self._told = entries
            for device in self._network.connected():
                self._send(device, entries)

    def _connected(self, device: DeviceId) -> None:
        self._send(device, self._trust.entries())

    def _send(self, device: DeviceId, entries: tuple[RosterEntry, ...]) -> None:
        self._network.send(device, ROSTER_TOPIC, to_map(Roster(entries[:MAX_ENTRIES])))

    def _roster_came(self, device: DeviceId, params: dict[str, Any]) -> None:
        roster = from_map(Roster, params)
        if len(roster.entries) > MAX_ENTRIES:
            raise ProtocolError("it sent too long a list of members")
        self._came.append((device, roster))
        self._wake.set()

    def _trust_changed(self, _members: frozenset[DeviceId]) -> None:
        """In the thread that changed the trust store."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)
