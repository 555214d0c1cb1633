"""What this device finds out about its network for `confidant doctor`; answers others who ask."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confidantd.discovery.announcement import Announcement
from confidantd.discovery.interfaces import interface_names
from confidantd.errors import ConfidantError, NotAllowedError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, short_id
from confidantd.net.allowance import Allowances
from confidantd.net.network import Network
from confidantd.swarm.addresses import parse_address
from confidantd.swarm.diagnosis import Answer, Dialled, Facts, Neighbour
from confidantd.swarm.dialing import Dialing
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.messages import MAX_ADDRESSES, PROTOCOL_VERSION

DIAL_BACK = "swarm.dial-back"
DIAL_SECONDS = 2.0
ANSWER_SECONDS = 5.0
MOST_ASKED = 3  # devices that are asked at once: more say nothing new
QUESTIONS = (0.2, 5.0)  # of one member: a second, and at once


@dataclass(frozen=True, slots=True)
class DialledBack:
    """What came of dialling the addresses that the asking device names as its own; whether it is
    heard by mDNS; and the clock here (seconds since 1970).
    """

    dialled: dict[str, str]
    hears: bool
    clock: float


class Reach:
    """Asks connected devices to dial back, and does so for others. `hears`: whether a device's
    announcement has arrived here.
    """

    def __init__(
        self,
        network: Network,
        trust: TrustStore,
        dialing: Dialing,
        hears: Callable[[DeviceId], bool],
    ) -> None:
        self._network, self._trust, self._dialing, self._hears = network, trust, dialing, hears
        self._allowed = Allowances(*QUESTIONS, remembered=512)
        network.on_request(DIAL_BACK, self._dial_back)

    async def facts(
        self,
        addresses: Sequence[str],
        mdns_problem: str | None,
        heard: Sequence[Announcement],
        name_of: Callable[[DeviceId], str],
    ) -> Facts:
        """All that is known, and what others answer now. `mdns_problem`: empty where mDNS works,
        None where it is off; `heard`: announcements.
        """
        answers, connected = await self._answers(), self._network.connected()
        members, protocols = self._trust.members(), {h.device_id: h.version for h in heard}
        neighbours = [
            Neighbour(
                name_of(device) or short_id(device),
                device in connected,
                protocols.get(device),
                _said(self._dialing.failures.get(device, {})),
                answers.get(device),
            )
            for device in members
        ]
        return Facts(
            str(PROTOCOL_VERSION),
            self._network.port,
            "off" if mdns_problem is None else "failed" if mdns_problem else "running",
            mdns_problem or "",
            await asyncio.to_thread(interface_names, addresses),
            neighbours,
            [(h.name or short_id(h.device_id), h.version) for h in heard
             if h.device_id not in members],
            _said(self._dialing.typed),
        )  # fmt: skip

    async def _answers(self) -> dict[DeviceId, Answer]:
        """Of some connected devices, as far as they answer in time."""
        asked = sorted(self._network.connected())[:MOST_ASKED]
        found = await asyncio.gather(*(self._ask(device) for device in asked))
        return {d: answer for d, answer in zip(asked, found, strict=True) if answer is not None}

    async def _ask(self, device: DeviceId) -> Answer | None:
        began = time.time()
        try:
            fields = await self._network.request(
                device, DIAL_BACK, {}, timeout_seconds=ANSWER_SECONDS
            )
            found = from_map(DialledBack, fields)
        except ConfidantError:
            return None
        between = (began + time.time()) / 2
        return Answer(_outcomes(found.dialled), found.hears, found.clock - between)

    async def _dial_back(self, device: DeviceId, _params: dict[str, Any]) -> dict[str, Any]:
        """Only its own port is dialled, at addresses of networks like this one: it reaches nothing
        else by asking.
        """
        if not self._allowed.take(device, asyncio.get_running_loop().time()):
            raise NotAllowedError("it asks too often", "try again in a minute")
        peer, seen = self._network.peer(device), self._network.address(device)
        said = peer.addresses[:MAX_ADDRESSES] if peer is not None else ()
        port, host = (peer.port, seen[0]) if peer is not None and seen is not None else (0, "")
        addresses = tuple(address for address in said if _may_be_its_own(address, host, port))
        dialled = await asyncio.gather(*(_dial(address) for address in addresses))
        hears = self._hears(device)
        return to_map(DialledBack(dict(zip(addresses, dialled, strict=True)), hears, time.time()))


def _said(failures: Mapping[str, ConfidantError]) -> dict[str, tuple[str, str]]:
    return {address: (failure.code, failure.message) for address, failure in failures.items()}


def _may_be_its_own(address: str, seen_at: str, port: int) -> bool:
    """Whether a device that was seen at a host, and listens on a port, may be there as well."""
    host, named = parse_address(address) or ("", 0)
    if named != port:
        return False
    try:
        there = ipaddress.ip_address(host)
    except ValueError:
        return False
    return host == seen_at or (there.is_private and not there.is_loopback)


async def _dial(address: str) -> Dialled:
    """Open a TCP connection and close it."""
    host, port = parse_address(address) or ("", 0)
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "no-route"
    writer.transport.abort()
    return "ok"


def _outcomes(said: Mapping[str, str]) -> dict[str, Dialled]:
    known: dict[str, Dialled] = {
        "ok": "ok", "refused": "refused", "silent": "silent", "no-route": "no-route"
    }  # fmt: skip
    return {
        a: known[outcome] for a, outcome in list(said.items())[:MAX_ADDRESSES] if outcome in known
    }
