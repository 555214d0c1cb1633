"""Memory limits that control groups (versions 1 and 2) put on this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60  # version 1 writes a huge number for "no limit"


@dataclass(frozen=True, slots=True)
class _Names:
    """File names of one version, and its names for page cache: not used lately, used lately, and
    mapped by processes that run.
    """

    limit: str
    used: str
    inactive: str
    active: str
    mapped: str


_VERSION_1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes",
    "total_inactive_file", "total_active_file", "total_mapped_file",
)  # fmt: skip
_VERSION_2 = _Names(
    "memory.max", "memory.current", "inactive_file", "active_file", "file_mapped"
)  # fmt: skip


def memory_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Limit and use (bytes) of every group that this process is in and can read.

    File cache that the kernel drops when memory is needed does not count as used: that of files
    that no process maps, whoever read them lately.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no control groups, or Android denies it
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _upwards(root, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            found += _upwards(root / "memory", path, _VERSION_1)
    return [(limit, used) for limit, used in found if limit < UNLIMITED]


def _upwards(root: Path, path: str, names: _Names) -> Iterator[tuple[int, int]]:
    """A group and those above it; in a container only the topmost may be there."""
    folder = root / path.lstrip("/")
    while folder.is_relative_to(root):
        with contextlib.suppress(OSError, ValueError):  # no such level, or `max`: no limit
            limit, used = (int((folder / name).read_text()) for name in (names.limit, names.used))
            yield limit, max(0, used - _droppable(folder / "memory.stat", names))
        folder = folder.parent


def _droppable(stat: Path, names: _Names) -> int:
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in stat.read_text().splitlines():
            key, _, value = line.partition(" ")
            found[key] = int(value)
    inactive, active, mapped = (
        found.get(name, 0) for name in (names.inactive, names.active, names.mapped)
    )
    return max(inactive, inactive + active - mapped)
