"""The swarm as the rest of the daemon sees it: who is there, and who coordinates."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from confidantd.discovery.announcement import Announcement
from confidantd.discovery.interfaces import usable_addresses
from confidantd.errors import NoCoordinatorError, StorageError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, short_id
from confidantd.net.network import Network
from confidantd.swarm.addresses import (
    AddressBook,
    format_address,
    is_ip_address,
    parse_address,
    typed_address,
)
from confidantd.swarm.conflict import ConflictWatch
from confidantd.swarm.diagnosis import Facts
from confidantd.swarm.dialing import Dialing
from confidantd.swarm.inviting import Joined
from confidantd.swarm.link_measuring import LinkMeasuring
from confidantd.swarm.membership import Membership
from confidantd.swarm.memory import load_addresses, load_term, save_addresses
from confidantd.swarm.pairing_service import PairingService
from confidantd.swarm.reach import Reach
from confidantd.swarm.roster import RosterGossip
from confidantd.swarm.state import CoordinatorView, PeerView, swarm_tag
from confidantd.wire.messages import MAX_ADDRESSES, PROTOCOL_VERSION
from confidantd.wire.resources import Resources

_log = logging.getLogger(__name__)

REFRESH_SECONDS = 3.0  # own addresses, announcement, members and what is remembered follow
MAX_UNPAIRED = 64
MAX_PORT = 65_536
MAX_ANNOUNCED = 4  # per device: a forged announcement must not push out every proven address

Listener = Callable[[], None]


class Discovery(Protocol):
    """What the swarm needs of mDNS."""

    def watch(
        self, found: Callable[[Announcement], None], lost: Callable[[Announcement], None]
    ) -> None: ...

    def announce(self, announcement: Announcement) -> None: ...

    @property
    def problem(self) -> str: ...


class Swarm:
    """Create it before `network.run()` starts. `peers` are typed addresses (`host:port`)."""

    def __init__(
        self,
        network: Network,
        trust: TrustStore,
        *,
        peers: Sequence[str] = (),
        discovery: Discovery | None = None,
    ) -> None:
        self._network = network
        self._me = network.identity.device_id
        self._home = network.identity.home
        self._trust = trust
        self._typed = [typed_address(text) for text in peers]
        self._discovery = discovery
        self._book = AddressBook()
        self._saved: object = None
        self._ips: tuple[str, ...] = ()
        self._announced: dict[tuple[DeviceId, str], Announcement] = {}
        self._listeners: list[Listener] = []
        self._change = asyncio.Event()
        self._membership = Membership(network, trust, self._book, self._notify_change)
        self._membership.on_gossip(self._gossiped)
        self._measuring = LinkMeasuring(network, self._membership)
        self._conflict = ConflictWatch(network, self._notify_change)
        self._dialing = Dialing(network, self._book, self._membership.refused)
        self._roster = RosterGossip(network, trust)
        self._reach = Reach(network, trust, self._dialing, self._hears)
        self.pairing = PairingService(
            network,
            trust,
            self._roster,
            self._invitations,
            self._next_change,
            self._announce_now,
            self._met,
        )
        network.on_connected(self._connected)
        network.on_disconnected(self._disconnected)
        if discovery is not None:
            discovery.watch(self._found, self._lost)

    async def run(self) -> None:
        """Serve until cancelled; says good-bye to its peers then. Waits for the network."""
        await self._network.started.wait()
        term = await asyncio.to_thread(load_term, self._home)
        self._book.update(await asyncio.to_thread(load_addresses, self._home))
        for device in self._trust.members():
            for address in self._book.get(device):
                self._network.expect((parse_address(address) or ("", 0))[0])
        for host, port in self._typed:
            self._dialing.start_typed(host, port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._membership.run(term), name="swarm.membership")
                group.create_task(self._conflict.run(), name="swarm.conflict")
                group.create_task(self._measuring.run(), name="swarm.links")
                group.create_task(self._roster.run(), name="swarm.roster")
                group.create_task(self._refresh_for_ever(), name="swarm.refresh")
        finally:
            await self.pairing.close()
            await self._dialing.close()
            await self._save()

    def peers(self) -> tuple[PeerView, ...]:
        """This device first, then the members by name, then unpaired devices that announce."""
        members = [self._member_view(device) for device in self._trust.members()]
        members.sort(key=lambda view: (view.name.lower(), view.id))
        return (self._self_view(), *members, *self._unpaired_views())

    def coordinator(self) -> CoordinatorView | None:
        """Whom this device follows, itself included; None during an election."""
        claim = self._membership.standing.claim
        if claim is None:
            return None
        return CoordinatorView(claim.coordinator, self._name(claim.coordinator), claim.term)

    def conflict(self) -> str | None:
        """One sentence if another daemon has this device's identity (a copied home)."""
        return self._conflict.sentence()

    async def network_facts(self) -> Facts:
        """What `confidant doctor` judges; asks other devices, for some seconds at most."""
        discovery = self._discovery
        return await self._reach.facts(
            self._ips,
            None if discovery is None else discovery.problem,
            tuple(self._announced.values()),
            self._name,
        )

    def _hears(self, device: DeviceId) -> bool:
        return any(heard.device_id == device for heard in self._announced.values())

    def tag(self) -> str:
        """A short name for this set of paired devices."""
        return swarm_tag([self._me, *self._trust.members()])

    def set_resources(self, resources: Resources) -> None:
        """What this device offers; gossiped with its heartbeats."""
        self._membership.set_resources(resources)

    def fastest_link_mbps(self) -> float | None:
        """What this device's radio can do, as far as any link shows it."""
        found = (link.mbps for link in self._membership.links().values())
        return max((mbps for mbps in found if mbps is not None), default=None)

    async def measure_link(self, device: DeviceId) -> float:
        """Mbit/s of the link to a member, measured now; ConfidantError if that cannot be."""
        return await self._measuring.measure(device)

    def on_change(self, listener: Listener) -> None:
        """Call when a state, the coordinator or the conflict changes."""
        self._listeners.append(listener)

    async def wait_for_coordinator(self, timeout_seconds: float) -> CoordinatorView:
        """The coordinator as soon as there is one; `NoCoordinatorError` if it takes longer."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while (view := self.coordinator()) is None:
                    await self._change.wait()
                return view
        except TimeoutError:
            raise NoCoordinatorError(
                f"no coordinator was elected within {timeout_seconds:g} s", "see `confidant peers`"
            ) from None

    def _notify_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        for listener in self._listeners:
            listener()

    async def _next_change(self) -> None:
        await self._change.wait()

    async def _refresh_for_ever(self) -> None:
        while True:
            ips = self._ips = await asyncio.to_thread(usable_addresses, self._network.hosts)
            port = self._network.port
            self._network.addresses = tuple(format_address(ip, port) for ip in ips[:MAX_ADDRESSES])
            self._dialing.follow(set(self._trust.members()))
            self._announce_now()
            await self._save()
            await asyncio.sleep(REFRESH_SECONDS)

    async def _save(self) -> None:
        members = sorted(self._trust.members())
        state = self._book.to_json(members)
        if state == self._saved:
            return
        self._saved = state
        try:
            await asyncio.to_thread(save_addresses, self._home, state)
        except StorageError as failure:
            _log.warning("the addresses of members are not kept: %s", failure)

    def _announce_now(self) -> None:
        if self._discovery is not None:
            self._discovery.announce(
                Announcement(
                    device_id=self._me,
                    name=self._network.name,
                    tag=self.tag(),
                    addresses=self._ips,
                    port=self._network.port,
                    version=str(PROTOCOL_VERSION),
                    instance=self._network.instance,
                    resources_digest=_digest(self._membership.resources),
                    invitation=self.pairing.inviting.announced,
                )
            )

    def _found(self, announcement: Announcement) -> None:
        device = announcement.device_id
        addresses = _addresses(announcement)
        if device == self._me:
            if announcement.instance != self._network.instance:
                self._conflict.announced(addresses)
            return
        if len(self._announced) < MAX_UNPAIRED or device in self._trust.members():
            self._announced[(device, announcement.instance)] = announcement
        if device in self._trust.members():
            self._dialing.follow(set(self._trust.members()))
            self._book.put_first(device, addresses[:MAX_ANNOUNCED])
            self._dialing.nudge(device)
        self._notify_change()

    def _invitations(self, number: str) -> list[tuple[str, int]]:
        """Where devices that announce an open invitation of this number take joiners."""
        found = []
        for announcement in self._announced.values():
            open_number, _, port = announcement.invitation.partition(":")
            if open_number == number and port.isascii() and port.isdigit():
                found += [(ip, int(port)) for ip in announcement.addresses if is_ip_address(ip)]
        return [(ip, port) for ip, port in found if 0 < port < MAX_PORT]

    def _met(self, joined: Joined) -> None:
        """A device was paired just now: its address is known, so it is connected soon."""
        if 0 < joined.port < MAX_PORT:
            self._network.expect(joined.host)
            self._book.set_name(joined.device, joined.name)
            self._book.put_first(joined.device, [format_address(joined.host, joined.port)])
        self._dialing.follow(set(self._trust.members()))
        self._dialing.nudge(joined.device)

    def _lost(self, announcement: Announcement) -> None:
        self._announced.pop((announcement.device_id, announcement.instance), None)
        if announcement.device_id not in self._trust.members():
            self._notify_change()

    def _gossiped(self, device: DeviceId, addresses: tuple[str, ...]) -> None:
        if device == self._me:
            for address in addresses:
                self._conflict.suspect(address)
        elif device in self._trust.members() and self._book.put_last(device, addresses):
            self._dialing.nudge(device)

    def _connected(self, device: DeviceId) -> None:
        peer, address = self._network.peer(device), self._network.address(device)
        if peer is None or address is None:
            return
        self._book.set_name(device, peer.name)
        self._book.put_first(device, [format_address(*address)])
        self._book.put_last(device, peer.addresses)

    def _disconnected(self, device: DeviceId) -> None:
        if not self._membership.left(device):  # else it would be reached while it still ends
            self._dialing.nudge(device)

    def _self_view(self) -> PeerView:
        address = next(iter(self._network.addresses), "")
        return PeerView(
            id=self._me,
            name=self._network.name,
            state="alive",
            address=address,
            round_trip_ms=0.0,
            resources=self._membership.resources,
            is_self=True,
            links=self._membership.links(),
        )

    def _member_view(self, device: DeviceId) -> PeerView:
        connected = self._network.address(device)
        address = (
            format_address(*connected) if connected else next(iter(self._book.get(device)), "")
        )
        member = self._membership.members.get(device)
        return PeerView(
            id=device,
            name=self._name(device),
            state=self._membership.state(device),
            address=address,
            round_trip_ms=member.round_trip_ms if member else None,
            resources=member.resources if member else None,
            is_self=False,
            bandwidth_mbps=self._membership.link_mbps(device),
            links=member.links if member else {},
        )

    def _unpaired_views(self) -> list[PeerView]:
        members = self._trust.members()
        found = {
            a.device_id: PeerView(
                id=a.device_id,
                name=a.name or short_id(a.device_id),
                state="unpaired",
                address=next(iter(_addresses(a)), ""),
                round_trip_ms=None,
                resources=None,
                is_self=False,
            )
            for a in self._announced.values()
            if a.device_id not in members
        }
        return sorted(found.values(), key=lambda view: (view.name.lower(), view.id))

    def _name(self, device: DeviceId) -> str:
        if device == self._me:
            return self._network.name
        announced = (a.name for (d, _), a in self._announced.items() if d == device)
        return self._book.name(device) or next(announced, "") or short_id(device)


def _addresses(announcement: Announcement) -> tuple[str, ...]:
    return tuple(
        format_address(ip, announcement.port) for ip in announcement.addresses if is_ip_address(ip)
    )


def _digest(resources: Resources | None) -> str:
    """Of what does not change from minute to minute: a new digest is a new announcement."""
    if resources is None:
        return ""
    lasting = (resources.memory_bytes, resources.backends, resources.roles, resources.version)
    return hashlib.sha256(repr(lasting).encode()).hexdigest()[:16]
