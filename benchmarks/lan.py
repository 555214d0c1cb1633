"""How fast devices on a LAN see each other, elect a coordinator, and elect another.

Three daemons in network namespaces joined by 50 Mbit/s links, real mDNS, no typed
addresses. Needs root. Run from the project's folder: `python -m benchmarks.lan`.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.report import Claim, options, report
from confidantd.cli.client import Client
from tests.e2e.devices import Device, pair
from tests.lan.namespaces import Lan

NAMES = ("anna", "ben", "cleo")
REACH_SECONDS = 5.0
LIMIT_SECONDS = 30.0
POLL_SECONDS = 0.02


async def states(device: Device) -> tuple[int, str | None]:
    """How many peers a device sees alive, and whom it follows."""
    async with Client(device.home) as client:
        peers = (await client.get("/v1/peers"))["peers"]
        coordinator = (await client.get("/v1/status"))["coordinator"]
    alive = sum(1 for peer in peers if peer["state"] == "alive" and not peer["self"])
    return alive, coordinator and coordinator["name"]


async def seconds_until(condition: Callable[[], Awaitable[bool]]) -> float:
    """Seconds until a condition holds; asked fifty times a second."""
    started = time.monotonic()
    while not await condition():
        if time.monotonic() - started > LIMIT_SECONDS:
            return LIMIT_SECONDS
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - started


async def measure(devices: list[Device], started: float) -> tuple[float, float, float]:
    """Seconds until all see each other, follow one coordinator, and follow another.

    The first two count from `started`, when the three daemons were launched together.
    """

    async def seen() -> bool:
        return all([(await states(d))[0] == len(devices) - 1 for d in devices])

    async def elected() -> bool:
        found = {(await states(d))[1] for d in devices}
        return len(found) == 1 and None not in found

    await seconds_until(seen)
    see = time.monotonic() - started
    await seconds_until(elected)
    elect = time.monotonic() - started
    name = (await states(devices[0]))[1]
    lost = next(device for device in devices if device.name == name)
    left = [device for device in devices if device is not lost]
    lost.kill()

    async def elected_again() -> bool:
        found = {(await states(d))[1] for d in left}
        return len(found) == 1 and found <= {d.name for d in left}

    return see, elect, await seconds_until(elected_again)


def one_round(folder: Path) -> tuple[float, float, float]:
    """A fresh LAN with fresh daemons."""
    with Lan(len(NAMES), mbit=50) as lan:
        devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(NAMES, lan.hosts, strict=True)
        ]
        pair(devices)
        try:
            started = time.monotonic()
            for device in devices:
                device.launch()
            for device in devices:
                device.wait_until_ready()
            return asyncio.run(measure(devices, started))
        finally:
            for device in devices:
                if device.process is not None and device.process.poll() is None:
                    device.stop()


def main() -> int:
    """Medians over the rounds; the slowest is in the detail."""
    chosen = options(__doc__ or "")
    rounds = []
    for _ in range(2 if chosen.quick else 7):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder)))
    names = (
        "all devices see each other",
        "all follow one coordinator",
        "both survivors follow a new one after SIGKILL",
    )
    claims = []
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        detail = f"median of {len(times)}, slowest {max(times):.2f} s"
        claims.append(Claim(name, statistics.median(times), REACH_SECONDS, "s", detail))
    return report(claims, as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
