"""Whole swarms in one process: identity, network and swarm service per device."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from confidantd.discovery.mdns import MdnsDiscovery
from confidantd.ids import DeviceId
from confidantd.swarm.service import Swarm
from confidantd.wire.resources import Resources
from tests.component.net_support import LOOPBACK, Device


def resources(memory_bytes: int, *roles: str) -> Resources:
    """What a small device offers."""
    return Resources(
        memory_bytes=memory_bytes,
        available_bytes=memory_bytes // 2,
        backends=("cpu",),
        roles=roles,
        gflops=10.0,
        cores=2,
        threads=2,
        charging=None,
        battery_percent=None,
        bandwidth_mbps=None,
        load=0.1,
        version="0.1.0",
        granted_bytes=0,
    )


class SwarmDevice(Device):
    """A device whose swarm service can be started and stopped."""

    def __init__(self, home: Path, peers: Sequence[str] = (), *, mdns: bool = False) -> None:
        super().__init__(home)
        self.discovery = MdnsDiscovery(LOOPBACK) if mdns else None
        self.swarm = Swarm(self.network, self.trust, peers=peers, discovery=self.discovery)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.network.port}"

    async def start(self) -> None:
        """Run network, swarm and discovery."""
        self._tasks = [
            asyncio.create_task(self.network.run()),
            asyncio.create_task(self.swarm.run()),
        ]
        if self.discovery is not None:
            self._tasks.append(asyncio.create_task(self.discovery.run()))
        await self.network.started.wait()

    async def stop(self) -> None:
        """Stop all as the daemon does: the swarm says good-bye before the network closes."""
        for task in reversed(self._tasks):
            task.cancel()
            await asyncio.wait({task})
        for task in self._tasks:
            if not task.cancelled():
                task.result()
        self._tasks = []

    def states(self) -> dict[DeviceId, str]:
        """Every other device's state."""
        return {peer.id: peer.state for peer in self.swarm.peers() if not peer.is_self}

    def followed(self) -> DeviceId | None:
        """The coordinator's id."""
        coordinator = self.swarm.coordinator()
        return coordinator.id if coordinator else None


async def new_swarm_device(
    home: Path, peers: Sequence[str] = (), *, mdns: bool = False
) -> SwarmDevice:
    """A swarm device, made off the event loop since that reads and writes files."""
    return await asyncio.to_thread(SwarmDevice, home, peers, mdns=mdns)


@contextlib.asynccontextmanager
async def stopped_at_end(devices: Sequence[SwarmDevice]) -> AsyncIterator[None]:
    """Stop whatever still runs."""
    try:
        yield
    finally:
        await asyncio.gather(*(device.stop() for device in devices))


def agreed(devices: Sequence[SwarmDevice]) -> bool:
    """All hear all, and follow one coordinator that is among them."""
    ids = {device.id for device in devices}
    followed = {device.followed() for device in devices}
    alive = all(
        {d for d, state in device.states().items() if state == "alive"} >= ids - {device.id}
        for device in devices
    )
    return alive and len(followed) == 1 and followed <= ids
