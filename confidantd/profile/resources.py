"""What this device has at this moment: memory within every limit, cores, battery, roles."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

import psutil

import confidantd
from confidantd.wire.resources import Resources

RESERVE_FRACTION = 0.1  # of the memory that is available now: left to the user's other apps
COMPILER_MODULES = ("torch", "onnxscript")
_CGROUP_UNLIMITED = 1 << 60  # version 1 writes a huge number for "no limit"


def read_resources(
    *, memory_cap: int | None, granted_bytes: int, threads: int, gflops: float
) -> Resources:
    """Resources of this device.

    `memory_cap` (bytes, `--memory`) bounds what jobs may use in all; without it that is
    what is available now, less a reserve. What is granted already is not offered again.
    """
    charging, percent = _battery()
    total, available = memory_bytes()
    usable = int(available * (1 - RESERVE_FRACTION))
    if memory_cap is not None:
        usable = min(usable, memory_cap)
    return Resources(
        memory_bytes=total,
        available_bytes=max(0, usable - granted_bytes),
        backends=_backends(),
        roles=roles(),
        gflops=gflops,
        cores=usable_cores(),
        threads=threads,
        charging=charging,
        battery_percent=percent,
        bandwidth_mbps=None,
        load=_load(),
        version=confidantd.__version__,
        granted_bytes=granted_bytes,
    )


def memory_bytes() -> tuple[int, int]:
    """Physical and available memory, neither above the limit of this process's cgroup."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _cgroup_limits():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def roles() -> tuple[str, ...]:
    """`compiler` where torch and its ONNX exporter are installed (found, not imported)."""
    try:
        found = all(importlib.util.find_spec(name) for name in COMPILER_MODULES)
    except ModuleNotFoundError:
        found = False
    return ("compiler",) if found else ()


def _backends() -> tuple[str, ...]:
    return ("cpu",) if importlib.util.find_spec("onnxruntime") else ()


def _load() -> float:
    try:
        return min(1.0, psutil.getloadavg()[0] / usable_cores())
    except OSError:  # Android denies /proc/loadavg
        return 0.0


def _battery() -> tuple[bool | None, float | None]:
    """Charging and percent; None where there is no battery or no permission to ask."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, NotImplementedError):
        return None, None
    if battery is None:
        return None, None
    return bool(battery.power_plugged), float(battery.percent)


def _cgroup_limits() -> list[tuple[int, int]]:
    """Memory limit and use (bytes) of every cgroup that this process is in and can read."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits_up(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            found += _limits_up(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return [(limit, used) for limit, used in found if limit < _CGROUP_UNLIMITED]


def _limits_up(root: Path, path: str, limit: str, used: str) -> list[tuple[int, int]]:
    folder = root / path.lstrip("/")
    found = []
    while folder.is_relative_to(root):
        with contextlib.suppress(OSError, ValueError):  # `max`, or no such level in this namespace
            found.append((int((folder / limit).read_text()), int((folder / used).read_text())))
        folder = folder.parent
    return found
