"""What a device has to offer, as gossiped with its heartbeats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory, speed, power and load of one device at one moment.

    `memory_bytes` is physical, `available_bytes` is what jobs may use now and
    `granted_bytes` what running jobs have been promised. `gflops` is 0 until measured.
    `bandwidth_mbps` is that of its fastest link, None until one is measured.
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
