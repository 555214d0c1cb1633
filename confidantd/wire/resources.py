"""What a device has to offer, as gossiped with its heartbeats."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_REASON_CHARACTERS = 200
MOST = 1e18  # bytes, or GFLOP/s: no device has more


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory, speed, power and load of one device at one moment.

    `memory_bytes` is physical, `available_bytes` is what jobs may use now and
    `granted_bytes` what running jobs have been promised. `gflops` is 0 until measured.
    `bandwidth_mbps` is that of its fastest link, None until one is measured.
    `temperature_celsius` is that of the processor or battery, whichever is hotter; None where
    nothing tells it. `refuses` says why the device takes no work for others now; empty: it does.
    `charging` and `battery_percent` are None without a battery. `load` is the share of
    the CPU in use, 0 to 1. `roles` holds "compiler" where torch is installed.
    """

    memory_bytes: int
    available_bytes: int
    backends: tuple[str, ...]
    roles: tuple[str, ...]
    gflops: float
    cores: int
    threads: int
    charging: bool | None
    battery_percent: float | None
    bandwidth_mbps: float | None
    load: float
    version: str
    granted_bytes: int
    temperature_celsius: float | None = None
    refuses: str = ""


def believable(found: Resources) -> bool:
    """Whether what a peer says of its condition can be shown and kept."""
    celsius, mbps = found.temperature_celsius, found.bandwidth_mbps
    amounts = (found.memory_bytes, found.available_bytes, found.granted_bytes, found.gflops)
    return (
        len(found.refuses) <= MAX_REASON_CHARACTERS
        and (celsius is None or math.isfinite(celsius))
        and (mbps is None or 0 < mbps < math.inf)
        and all(0 <= amount < MOST for amount in amounts)
    )
