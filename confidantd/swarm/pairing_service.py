"""Pairing as the daemon's API sees it: invite, join, remove, leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from confidantd.errors import DeviceError, NotPairedError, PeerLostError, UsageError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.net.network import Network
from confidantd.swarm.addresses import typed_address
from confidantd.swarm.inviting import Inviting, Joined
from confidantd.swarm.joining import join
from confidantd.swarm.pairing import Code, Invitation, read_code
from confidantd.swarm.roster import RosterGossip
from confidantd.wire.pairing import Card

JOIN_SECONDS = 80.0  # with looking for it, and with all of its addresses
FIND_SECONDS = 12.0  # mDNS may miss the first answers on a busy Wi-Fi
GOODBYE_SECONDS = 0.3  # for the last words before connections end

Address = tuple[str, int]


class PairingService:
    """`find` gives the addresses of open invitations with a number, `news` waits until that may
    be others; `changed` hears that an invitation is opened or closed, `met` of new members.
    """

    def __init__(
        self,
        network: Network,
        trust: TrustStore,
        roster: RosterGossip,
        find: Callable[[str], list[Address]],
        news: Callable[[], Awaitable[object]],
        changed: Callable[[], None],
        met: Callable[[Joined], None],
    ) -> None:
        self._network, self._trust, self._roster = network, trust, roster
        self._find, self._news, self._met = find, news, met
        self.inviting = Inviting(network.identity, trust, network.hosts, self._card, changed, met)

    async def invite(self) -> Invitation:
        """Open an invitation; one that is open already is withdrawn."""
        return await self.inviting.invite()

    async def join(self, code_text: str, at: str, *, merge: bool = False) -> Joined:
        """Pair with the device whose code this is: at an address, or found by mDNS if empty.

        Both devices' swarms become one then: `DeviceError` if this one has others in its own,
        unless that is what is wanted (`merge`).
        """
        code = read_code(code_text)
        invitation = self.inviting.invitation
        if invitation is not None and invitation.open and invitation.code == code:
            raise UsageError("this device shows that code itself", "type it on the other device")
        others = len(self._trust.members())
        if others and not merge:
            raise DeviceError(
                f"this device is paired with {others} other{'' if others == 1 else 's'} already",
                "confidant leave first; or join --merge, and all of them belong together",
            )
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                joined = await self._join(code, at, merge=merge)
        except TimeoutError:
            raise PeerLostError(
                f"no device could be joined within {JOIN_SECONDS:.0f} s", "ask for a new code"
            ) from None
        self._met(joined)
        return joined

    async def _join(self, code: Code, at: str, *, merge: bool) -> Joined:
        addresses = [typed_address(at)] if at else await self._look_for(code)
        failure: PeerLostError | None = None
        for host, port in addresses:
            try:
                return await join(self._trust, code, host, port, self._card(), merge=merge)
            except PeerLostError as lost:
                failure = lost  # another of its addresses may work
        assert failure is not None
        raise failure

    async def remove(self, device: DeviceId) -> None:
        """Trust a device no longer, here and on every member; it hears of it and is cut off."""
        await asyncio.to_thread(self._trust.remove, device)
        self._network.disconnect(device, "it was removed from the members")

    async def leave(self) -> int:
        """Leave the swarm: members forget this device, and it forgets them; how many there were."""
        members = self._trust.members()
        if not members:
            raise NotPairedError("this device is paired with nobody", "there is nothing to leave")
        await self._roster.say_left()
        await asyncio.sleep(GOODBYE_SECONDS)
        await asyncio.to_thread(self._trust.leave)
        return len(members)

    async def close(self) -> None:
        """This device stops."""
        await self.inviting.close()

    async def _look_for(self, code: Code) -> list[Address]:
        try:
            async with asyncio.timeout(FIND_SECONDS):
                while not (found := self._find(code.number)):
                    await self._news()
                return found
        except TimeoutError:
            raise PeerLostError(
                f"no device with an open invitation {code.number} was found on this network",
                "check the code; or name the address that the inviter shows: --at HOST:PORT",
            ) from None

    def _card(self) -> Card:
        network = self._network
        return Card(network.identity.certificate_pem, network.name, network.port, self._trust.gone)
