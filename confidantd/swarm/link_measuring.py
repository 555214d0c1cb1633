"""Measures the links of this device, one at a time and seldom, and learns from real transfers."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId, short_id
from confidantd.net.network import Network
from confidantd.swarm.links import Candidate, LinkSchedule, smoothed
from confidantd.swarm.membership import Membership
from confidantd.wire.resources import Resources

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class LinkMeasuring:
    """What it finds goes to the membership, which gossips it."""

    def __init__(self, network: Network, membership: Membership) -> None:
        self._network = network
        self._membership = membership
        spread = random.Random()  # noqa: S311 - spreads measurements in time, protects nothing
        self._schedule = LinkSchedule(network.identity.device_id, spread)
        network.on_connected(lambda device: self._schedule.connected(device, self._now()))
        network.on_transfer(self._transferred)

    async def run(self) -> None:
        """Measure what is due until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            device = self._schedule.next(self._candidates(), self._now())
            if device is None:
                continue
            try:
                await self.measure(device)
            except ConfidantError as failure:
                _log.debug("the link to %s is not measured now: %s", short_id(device), failure)
                self._schedule.failed(device, self._now())

    async def measure(self, device: DeviceId) -> float:
        """Mbit/s of one link, now; ConfidantError if it cannot be measured."""
        mbps = await self._network.measure_link(device)
        _log.info("the link to %s carries %.1f Mbit/s", short_id(device), mbps)
        self._schedule.measured(device, self._now(), len(self._membership.members))
        self._membership.set_link(device, mbps)
        return mbps

    def _transferred(self, device: DeviceId, mbps: float) -> None:
        member = self._membership.members.get(device)
        if member is not None:
            _log.debug("a transfer from %s shows %.1f Mbit/s", short_id(device), mbps)
            self._membership.set_link(device, smoothed(member.mbps, mbps))

    def _candidates(self) -> Iterator[Candidate]:
        here = _works(self._membership.resources)
        for device, member in self._membership.members.items():
            if self._membership.state(device) == "alive":
                measured = self._membership.link_mbps(device) is not None
                yield Candidate(device, measured, here or _works(member.resources))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _works(resources: Resources | None) -> bool:
    return resources is not None and resources.granted_bytes > 0
