"""Members tell each other who belongs to the swarm: on meeting, and whenever that changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from confidantd.errors import ConfidantError, ProtocolError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, digest_of
from confidantd.net.allowance import Allowances
from confidantd.net.network import Network
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.roster import (
    MAX_CERTIFICATE_CHARACTERS,
    MAX_OF_AUTHOR,
    MAX_ROSTER_BYTES,
    MAX_SIGNATURE_BYTES,
    MAX_STATEMENTS,
    Roster,
    Statement,
)

_log = logging.getLogger(__name__)

ROSTER_TOPIC = "swarm.roster"
# Of one member: a second, and at once; to check signatures takes a quarter of a second of a laptop,
# and is the same as so many rosters if they were wrong.
ROSTERS, WRONG_COSTS = (0.2, 10.0), 40.0
LATER_SECONDS = 1.0
MOST_WAITING = 4  # of the largest, of all members together


class RosterGossip:
    """Sends the roster and takes those of others, one after the other."""

    def __init__(self, network: Network, trust: TrustStore) -> None:
        self._network = network
        self._trust = trust
        self._came: dict[DeviceId, Roster] = {}
        self._heard = Allowances(*ROSTERS, remembered=MAX_STATEMENTS)
        self._timer: asyncio.TimerHandle | None = None
        self._told: tuple[Statement, ...] = ()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        network.on_notify(ROSTER_TOPIC, self._roster_came)
        network.on_connected(self._connected)
        network.on_untrusted(self._untrusted)

    async def run(self) -> None:
        """Serve until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._trust.on_change(self._trust_changed)
        self._wake.set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._take()
                await self._sign()
                self._tell_all()
        finally:
            self._trust.forget_listener(self._trust_changed)
            if self._timer is not None:
                self._timer.cancel()

    async def say_left(self) -> None:
        """Tell everybody that this device leaves the swarm."""
        for statement in await asyncio.to_thread(self._trust.farewell):
            for device in self._network.connected():
                self._send(device, [statement])

    async def _take(self) -> None:
        """What came, as far as each sender may be heard now; the rest a little later."""
        for device in list(self._came):
            roster = self._came.pop(device)
            if device not in self._trust.members():
                continue  # it was removed meanwhile
            if not await asyncio.to_thread(self._trust.is_news, roster.statements):
                continue
            if not self._heard.take(device, asyncio.get_running_loop().time()):
                self._wait(device, roster)
                self._later()
                continue
            try:
                await asyncio.to_thread(self._trust.merge, roster.statements)
            except ProtocolError as failure:
                self._heard.of(device).spend(WRONG_COSTS, asyncio.get_running_loop().time())
                self._network.shun(device, failure.message)
            except ConfidantError as failure:
                _log.warning("the list of members could not be kept: %s", failure)

    def _later(self) -> None:
        if self._timer is None or self._timer.when() < asyncio.get_running_loop().time():
            self._timer = asyncio.get_running_loop().call_later(LATER_SECONDS, self._wake.set)

    async def _sign(self) -> None:
        try:
            await asyncio.to_thread(self._trust.sign)
        except ConfidantError as failure:
            _log.warning("members are told later of a new one: %s", failure)
            self._later()

    def _tell_all(self) -> None:
        statements = self._trust.statements()
        if statements != self._told:
            self._told = statements
            for device in self._network.connected():
                self._send(device, statements)

    def _connected(self, device: DeviceId) -> None:
        self._send(device, self._trust.statements())

    def _untrusted(self, device: DeviceId) -> None:
        """What it is told when it is gone, nobody knows."""
        self._send(device, self._trust.removal_of(device))

    def _send(self, device: DeviceId, statements: Iterable[Statement]) -> None:
        self._network.send(device, ROSTER_TOPIC, to_map(Roster(tuple(statements))))

    def _roster_came(self, device: DeviceId, params: dict[str, Any]) -> None:
        roster = from_map(Roster, params)
        if len(roster.statements) > MAX_STATEMENTS or roster.size > MAX_ROSTER_BYTES:
            raise ProtocolError("it sent too long a list of members")
        if not all(_is_short(statement) for statement in roster.statements):
            raise ProtocolError("it sent a list of members with too long fields")
        self._wait(device, roster)
        self._wake.set()

    def _wait(self, device: DeviceId, roster: Roster) -> None:
        """Keep it with what waits of the same device already, or alone where that is too much: it
        tells all it knows again when it is met again.
        """
        others = sum(waiting.size for d, waiting in self._came.items() if d != device)
        if others + roster.size > MOST_WAITING * MAX_ROSTER_BYTES:
            return
        both = Roster(self._came.get(device, Roster(())).statements + roster.statements)
        fits = len(both.statements) <= MAX_STATEMENTS and both.size <= MAX_ROSTER_BYTES
        self._came[device] = both if fits else roster

    def _trust_changed(self, _members: frozenset[DeviceId]) -> None:
        """In the thread that changed the trust store."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)


def _is_short(statement: Statement) -> bool:
    return (
        len(statement.certificate) <= MAX_CERTIFICATE_CHARACTERS
        and len(statement.signature) <= MAX_SIGNATURE_BYTES
        and len(statement.keeps) <= MAX_OF_AUTHOR
        and len(statement.author) == len(statement.device) == len(digest_of(b""))
    )
