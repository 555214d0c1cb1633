"""Heartbeats out, heartbeats in, and the election that follows from them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from confidantd.errors import ProtocolError, StorageError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, is_digest
from confidantd.net.network import Network
from confidantd.swarm.addresses import AddressBook
from confidantd.swarm.detector import BEAT_SECONDS
from confidantd.swarm.election import Scene, Standing, decide
from confidantd.swarm.member import Member
from confidantd.swarm.memory import save_term
from confidantd.swarm.state import PeerState
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.links import MAX_LINKS, Link, plausible
from confidantd.wire.messages import MAX_TERM, Beat, Rank
from confidantd.wire.resources import Resources, believable

_log = logging.getLogger(__name__)

BEAT_TOPIC = "swarm.beat"
BYE_TOPIC = "swarm.bye"
TICK_SECONDS = 0.25
STALL_SECONDS = 1.0  # a tick that late means that this device, not its peers, stood still
MAX_GOSSIPED = 1_024  # ids or addresses in one heartbeat

Listener = Callable[[], None]
GossipListener = Callable[[DeviceId, tuple[str, ...]], None]


class Membership:
    """The members, their states, and the coordinator; `term` is the one kept on disk."""

    def __init__(
        self, network: Network, trust: TrustStore, book: AddressBook, changed: Listener
    ) -> None:
        self.members: dict[DeviceId, Member] = {}
        self.resources: Resources | None = None
        self.standing = Standing()
        self._network = network
        self._me = network.identity.device_id
        self._trust = trust
        self._book = book
        self._changed = changed
        self._gossip: GossipListener | None = None
        self._states: dict[DeviceId, PeerState] = {}
        self._pulse = 0
        self._wake = asyncio.Event()
        self._saved_term = 0
        network.on_notify(BEAT_TOPIC, self._beat_came)
        network.on_notify(BYE_TOPIC, self._bye_came)
        network.on_connected(self._connected)
        network.on_disconnected(self._disconnected)

    async def run(self, term: int) -> None:
        """Beat and decide until cancelled, then say good-bye. `term` is the remembered one."""
        self.standing = Standing(term=term)
        self._saved_term = term
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat_for_ever(), name="swarm.beat")
                group.create_task(self._decide_for_ever(), name="swarm.decide")
        finally:
            for device in self._network.connected():
                self._network.send(device, BYE_TOPIC, {})

    def on_gossip(self, listener: GossipListener) -> None:
        """Give addresses that peers tell about a device to `listener`."""
        self._gossip = listener

    def state(self, device: DeviceId) -> PeerState:
        """alive, suspect or gone."""
        return self._states.get(device, "gone")

    def left(self, device: DeviceId) -> bool:
        """True if the device said good-bye: its daemon is ending, or has ended."""
        return device in self.members and self.members[device].left

    def set_resources(self, resources: Resources) -> None:
        """What this device offers from now on; told with the next heartbeats."""
        if resources != self.resources:
            urgent = self.resources is not None and resources.refuses != self.resources.refuses
            self.resources = resources
            for member in self.members.values():
                member.full_beat_soon()
            if urgent:  # jobs have to go elsewhere
                self._beat_all()

    def set_link(self, device: DeviceId, mbps: float) -> None:
        """The measured bandwidth from a member; told with the next heartbeats."""
        if device in self.members:
            self.members[device].mbps = mbps
            for member in self.members.values():
                member.full_beat_soon()

    def link_mbps(self, device: DeviceId) -> float | None:
        """Bandwidth of the link to a member as measured here, else there; None: not yet."""
        member = self.members.get(device)
        if member is None or member.mbps is not None:
            return member.mbps if member else None
        seen_there = member.links.get(self._me)
        return seen_there.mbps if seen_there else None

    def links(self) -> dict[DeviceId, Link]:
        """What this device measured of its links, as far as that is anything."""
        found = {device: member.link for device, member in list(self.members.items())[:MAX_LINKS]}
        return {device: link for device, link in found.items() if link != Link()}

    def refused(self, device: DeviceId) -> None:
        """Nothing listens at any address of a member."""
        if device in self.members:
            self.members[device].detector.refused()
            self._wake.set()

    def follow_trust(self) -> None:
        """Members are those whom we trust, neither more nor less."""
        trusted = self._trust.members()
        for device in set(self.members) - set(trusted):
            del self.members[device]
        for device in trusted:
            self.members.setdefault(device, Member(device))

    async def _decide_for_ever(self) -> None:
        last = self._now()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            now = self._now()
            if now - last > TICK_SECONDS + STALL_SECONDS:
                for member in self.members.values():
                    member.detector.forgive(now - last - TICK_SECONDS)
            last = now
            await self._decide(now)

    async def _decide(self, now: float) -> None:
        self.follow_trust()
        states = {device: m.detector.state(now) for device, m in self.members.items()}
        for device in self._network.connected():
            if states.get(device) == "gone":
                self._network.disconnect(device, "its heartbeat stopped")
        before, self_view = self._summary(), self._states
        self._states = states
        standing = decide(self.standing, self._scene(), now)
        if standing.term > self._saved_term:
            await self._save(standing.term)
        self.standing = standing
        if self._summary() != before or states != self_view:
            self._tell()

    def _tell(self) -> None:
        """Something that others follow changed: do not wait for the next heartbeat."""
        self._beat_all()
        self._changed()

    def _scene(self) -> Scene:
        alive, suspect = {}, set()
        for device, state in self._states.items():
            member = self.members.get(device)
            if member is None or member.word is None:
                continue
            if state == "alive":
                alive[device] = member.word
            elif state == "suspect":
                suspect.add(device)
        return Scene(self._me, self._rank(), self._pulse, alive, frozenset(suspect))

    def _summary(self) -> tuple[object, ...]:
        claim = self.standing.claim
        return (claim.coordinator, claim.term) if claim else ()

    def _rank(self) -> Rank:
        mine = self.resources
        if mine is None:
            return Rank()
        return Rank("compiler" in mine.roles, mine.charging is not False, mine.memory_bytes)

    async def _save(self, term: int) -> None:
        try:
            await asyncio.to_thread(save_term, self._network.identity.home, term)
        except StorageError as failure:
            _log.warning("the term of the election is not kept: %s", failure)
        self._saved_term = term

    async def _beat_for_ever(self) -> None:
        while True:
            self._pulse += 1
            self._wake.set()
            self._beat_all()
            await asyncio.sleep(BEAT_SECONDS)

    def _beat_all(self) -> None:
        heard = tuple(device for device, state in self._states.items() if state == "alive")
        for device in self._network.connected():
            self._beat(device, heard)

    def _beat(self, device: DeviceId, heard: tuple[DeviceId, ...]) -> None:
        member = self.members.get(device)
        if member is None:
            return
        now, full = self._now(), member.full_beat_due()
        echo, held_seconds = member.echo(now)
        claim = self.standing.claim
        beat = Beat(
            sequence=member.next_sequence(now),
            term=self.standing.term,
            rank=self._rank(),
            heard=heard[:MAX_GOSSIPED],
            claim=claim,
            echo=echo,
            echo_held_seconds=held_seconds,
            resources=self.resources if full else None,
            addresses=self._addresses() if full else {},
            links=self.links() if full else {},
        )
        self._network.send(device, BEAT_TOPIC, to_map(beat))

    def _addresses(self) -> dict[DeviceId, tuple[str, ...]]:
        devices = [self._me, *self.members][:MAX_GOSSIPED]
        known = {device: self._book.get(device) for device in devices}
        known[self._me] = self._network.addresses
        return {device: addresses for device, addresses in known.items() if addresses}

    def _beat_came(self, device: DeviceId, params: dict[str, Any]) -> None:
        beat = _checked(from_map(Beat, params))
        member = self.members.get(device)
        if member is None:
            return
        before = member.word
        member.heard(beat, self._now())
        if member.word != before:
            self._wake.set()
        if self._gossip is not None:
            for other, addresses in beat.addresses.items():
                self._gossip(other, addresses)

    def _bye_came(self, device: DeviceId, _params: dict[str, Any]) -> None:
        if device in self.members:
            self.members[device].said_goodbye()
            self._wake.set()

    def _connected(self, device: DeviceId) -> None:
        self.follow_trust()
        if device in self.members:
            self.members[device].connected(self._now())
            heard = tuple(d for d, state in self._states.items() if state == "alive")
            self._beat(device, heard)
        self._wake.set()

    def _disconnected(self, device: DeviceId) -> None:
        if device in self.members:
            self.members[device].detector.disconnected(self._now())
        self._wake.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _checked(beat: Beat) -> Beat:
    """`ProtocolError` (which ends the connection) for values that cannot be."""
    terms = [beat.term, beat.claim.term if beat.claim else 0]
    devices = [*beat.heard, *beat.addresses, *([beat.claim.coordinator] if beat.claim else [])]
    if not all(0 <= term <= MAX_TERM for term in terms) or len(devices) > 2 * MAX_GOSSIPED:
        raise ProtocolError("it sent a heartbeat with impossible values")
    if not all(map(is_digest, devices)) or not 0 <= beat.echo_held_seconds < 86_400:
        raise ProtocolError("it sent a heartbeat with impossible values")
    if beat.resources is not None and not believable(beat.resources):
        raise ProtocolError("it sent a heartbeat with impossible resources")
    if len(beat.links) > MAX_LINKS or not all(map(plausible, beat.links.values())):
        raise ProtocolError("it sent a heartbeat with impossible links")
    if not all(map(is_digest, beat.links)):
        raise ProtocolError("it sent a heartbeat with impossible links")
    return beat
