"""Slow devices on one machine: control groups that give processes a share of one core.

The period is short, so that a step sees the mean. Needs root and the `cpu` controller
(version 1 or 2).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US, LEAST_US = 20_000, 1_000


class CpuQuota:
    """One group; processes started by `prefix` and their children are in it."""

    def __init__(self, share: float | None = None) -> None:
        name = f"confidant-{os.getpid()}-{secrets.token_hex(3)}"
        self._second = (ROOT / "cgroup.controllers").exists()
        self._path = (ROOT if self._second else ROOT / "cpu") / name
        self._path.mkdir()
        self.set(share)

    @property
    def prefix(self) -> tuple[str, ...]:
        """In front of a command line: run it in this group."""
        procs = self._path / "cgroup.procs"
        return ("sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh")

    def set(self, share: float | None) -> None:
        """So many cores from now on; None for no limit."""
        quota = None if share is None else max(LEAST_US, int(share * PERIOD_US))
        if self._second:
            (self._path / "cpu.max").write_text(f"{quota or 'max'} {PERIOD_US}")
        else:
            (self._path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._path / "cpu.cfs_quota_us").write_text(str(quota or -1))

    def close(self) -> None:
        """Remove the group, whose processes have ended."""
        self._path.rmdir()


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
        made = [CpuQuota(share) for share in shares]
        for quota in made:
            stack.callback(quota.close)
        yield made
