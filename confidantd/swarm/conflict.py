"""Notices a copied home: another running daemon with this device's identity. Both say so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from confidantd.errors import (
    ConfidantError,
    IdentityConflictError,
    NotPairedError,
    PeerLostError,
    PeerRefusedError,
    ProtocolError,
)
from confidantd.ids import DeviceId
from confidantd.net.network import Network
from confidantd.swarm.addresses import format_address, parse_address
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

CONFLICT_TOPIC = "swarm.conflict"
RECHECK_SECONDS = 5.0
FORGET_SECONDS = 60.0  # an address that only fails to answer, after it was last named
MAX_CHECKED = 64


class ConflictWatch:
    """`sentence` is None while no other daemon is known to use this identity."""

    def __init__(self, network: Network, changed: Callable[[], None]) -> None:
        self._network = network
        self._changed = changed
        self._found: dict[str, float] = {}  # address of the other daemon -> when last named
        self._checked: set[str] = set()
        self._tasks = TaskSet("conflict")
        network.on_conflict(self._confirmed)
        network.on_twins(self._tell)
        network.on_notify(CONFLICT_TOPIC, self._told)

    def sentence(self) -> str | None:
        """What is wrong and what to do, in one clear sentence."""
        if not self._found:
            return None
        return (
            f"the daemon at {min(self._found)} has the identity of this device, "
            "so one of the two homes is a copy: stop the copy, delete the folder identity "
            "in its home, start it again and pair it"
        )

    def suspect(self, address: str) -> None:
        """Someone says that this device is at `address`: dial it once and see who answers."""
        own = {*self._network.addresses, format_address("127.0.0.1", self._network.port)}
        if address in own or address in self._checked or len(self._checked) >= MAX_CHECKED:
            return
        if parse_address(address) is not None:
            self._checked.add(address)
            self._tasks.start(self._check(address), f"check-{address}")

    def announced(self, addresses: tuple[str, ...]) -> None:
        """Another instance announces our id at these addresses."""
        for address in addresses:
            self._checked.discard(address)
            self.suspect(address)

    async def run(self) -> None:
        """Look again at what was found until cancelled, so that a repaired conflict goes."""
        try:
            while True:
                await asyncio.sleep(RECHECK_SECONDS)
                for address in list(self._found):
                    await self._check(address)
        finally:
            await self._tasks.close()

    async def _check(self, address: str) -> None:
        host, port = parse_address(address) or ("", 0)
        try:
            await self._network.connect(host, port, self._network.identity.device_id)
        except IdentityConflictError:
            return  # the network has told `_confirmed`
        except (PeerRefusedError, NotPairedError):
            self._clear(address)
        except PeerLostError:
            named = self._found.get(address)
            if named is not None and self._now() - named > FORGET_SECONDS:
                self._clear(address)
        except ConfidantError as failure:
            _log.debug("who is at %s stays unknown: %s", address, failure)
        else:
            self._clear(address)  # we reached ourselves

    def _confirmed(self, address: str) -> None:
        first = not self._found
        self._found[address] = self._now()
        if first:
            _log.error("%s", self.sentence())
            self._changed()

    def _clear(self, address: str) -> None:
        self._checked.discard(address)
        if self._found.pop(address, None) is not None and not self._found:
            _log.info("no other daemon has the identity of this device any more")
            self._changed()

    def _tell(self, device: DeviceId, other: str) -> None:
        """Two daemons use one member's identity: tell the one that is connected now."""
        _log.warning("two daemons use the identity of one member; one of them is at %s", other)
        self._network.send(device, CONFLICT_TOPIC, {"address": other})

    def _told(self, _device: DeviceId, params: dict[str, Any]) -> None:
        address = params.get("address")
        if not isinstance(address, str) or parse_address(address) is None:
            raise ProtocolError("it named an impossible address")
        self._confirmed(address)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
