"""What this device has at this moment: memory within every limit, cores, battery, roles."""

from __future__ import annotations

import functools
import importlib.util
import os

import psutil

import confidantd
from confidantd.profile.cgroup import memory_limits
from confidantd.profile.readiness import Condition
from confidantd.wire.resources import Resources

RESERVE_FRACTION = 0.1  # of the memory that is available now: left to the user's other apps
COMPILER_MODULES = ("torch", "onnxscript")
WORKER_MODULE = "confidantd.worker"


def read_resources(
    *,
    memory_cap: int | None,
    granted_bytes: int,
    threads: int,
    gflops: float,
    backends: tuple[str, ...] = (),
    bandwidth_mbps: float | None = None,
    condition: Condition = Condition(),  # noqa: B008 - frozen: nothing known
) -> Resources:
    """Resources of this device, in that `condition`.

    `memory_cap` (bytes, `--memory`) bounds what jobs may use in all; without it that is
    what is available now, less a reserve. What is granted already is not offered again.
    `backends` are those that were found by probing; before that there is the CPU.
    """
    total, available = memory_bytes()
    workers = worker_bytes() if granted_bytes else 0
    return Resources(
        memory_bytes=total,
        available_bytes=offered_bytes(available, memory_cap, granted_bytes, workers),
        backends=backends or _backends(),
        roles=roles(),
        gflops=gflops,
        cores=usable_cores(),
        threads=threads,
        charging=condition.battery.charging,
        battery_percent=condition.battery.percent,
        bandwidth_mbps=bandwidth_mbps,
        load=_load(),
        version=confidantd.__version__,
        granted_bytes=granted_bytes,
        temperature_celsius=condition.celsius,
        refuses=condition.refuses,
    )


def offered_bytes(available: int, cap: int | None, granted: int, workers: int) -> int:
    """What jobs may still be promised.

    `workers` (bytes) is what running stages use already: the system counts that as no
    longer available, so only the rest of `granted` has to be set aside.
    """
    usable = int(available * (1 - RESERVE_FRACTION)) - max(0, granted - workers)
    if cap is not None:
        usable = min(usable, cap - granted)
    return max(0, usable)


def worker_bytes() -> int:
    """Resident memory of this daemon's stage workers."""
    total = 0
    for child in _children():
        try:
            if WORKER_MODULE in child.cmdline():
                total += int(child.memory_info().rss)
        except psutil.Error:  # it has just ended
            continue
    return total


def _children() -> list[psutil.Process]:
    try:
        return psutil.Process().children()
    except (psutil.Error, OSError):  # a hardened /proc
        return []


def memory_bytes() -> tuple[int, int]:
    """Physical and available memory, neither above the limit of this process's cgroup."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in memory_limits():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def roles() -> tuple[str, ...]:
    """`compiler` where torch and its ONNX exporter are installed (found, not imported)."""
    try:
        found = all(importlib.util.find_spec(name) for name in COMPILER_MODULES)
    except ModuleNotFoundError:
        found = False
    return ("compiler",) if found else ()


@functools.cache
def _backends() -> tuple[str, ...]:
    return ("cpu",) if importlib.util.find_spec("onnxruntime") else ()


def _load() -> float:
    try:
        return min(1.0, psutil.getloadavg()[0] / usable_cores())
    except OSError:  # Android denies /proc/loadavg
        return 0.0
