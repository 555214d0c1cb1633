"""Slow and small devices on one machine: control groups that give processes a share of one core,
or so much memory.

The period is short, so that a step sees the mean, and each device stays on one processor: the
threads of a group on several of them take its quota from each other for periods on end. Needs
root and the `cpu` controller (version 1 or 2).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US, LEAST_US = 12_000, 1_000


class ControlGroup:
    """One group; processes started by `prefix` and their children are in it."""

    def __init__(self, controller: str) -> None:
        name = f"confidant-{os.getpid()}-{secrets.token_hex(3)}"
        self._second = (ROOT / "cgroup.controllers").exists()
        self._path = (ROOT if self._second else ROOT / controller) / name
        self._path.mkdir()

    @property
    def prefix(self) -> tuple[str, ...]:
        """In front of a command line: run it in this group."""
        procs = self._path / "cgroup.procs"
        return ("sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh")

    def close(self) -> None:
        """Remove the group, whose processes have ended."""
        self._path.rmdir()


class MemoryCap(ControlGroup):
    """One whose processes have so many bytes together, the cache of their files included."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__("memory")
        name = "memory.max" if self._second else "memory.limit_in_bytes"
        (self._path / name).write_text(str(most_bytes))


class CpuQuota(ControlGroup):
    """One that has a share of one core, on one processor if that is given."""

    def __init__(self, share: float | None = None, processor: int | None = None) -> None:
        super().__init__("cpu")
        self._pinned = () if processor is None else ("taskset", "--cpu-list", str(processor))
        self.set(share)

    @property
    def prefix(self) -> tuple[str, ...]:
        """In front of a command line: run it in this group."""
        return (*super().prefix, *self._pinned)

    def set(self, share: float | None) -> None:
        """So many cores from now on; None for no limit."""
        quota = None if share is None else max(LEAST_US, int(share * PERIOD_US))
        if self._second:
            (self._path / "cpu.max").write_text(f"{quota or 'max'} {PERIOD_US}")
        else:
            (self._path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._path / "cpu.cfs_quota_us").write_text(str(quota or -1))


def available() -> bool:
    """Whether groups can be made here."""
    try:
        CpuQuota().close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quotas(*shares: float | None) -> Iterator[list[CpuQuota]]:
    """Some groups, removed at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for share, processor in zip(shares, _processors(shares), strict=True):
            made.append(CpuQuota(share, processor))
            stack.callback(made[-1].close)
        yield made


def _processors(shares: Sequence[float | None]) -> list[int | None]:
    """For each device the emptiest processor; None for one that fits on none."""
    taken = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0.0)
    found: list[int | None] = []
    for share in shares:
        emptiest = min(taken, key=lambda processor: taken[processor])
        fits = share is not None and taken[emptiest] + share <= 1.0
        found.append(emptiest if fits else None)
        taken[emptiest] += share or 1.0
    return found
