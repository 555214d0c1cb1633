"""Times of parts that ran together, and the curves over sizes of shares that follow from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from confidantd.engine.split.blocks import ATTENTION, SplitBlocks
from confidantd.engine.split.decode import SplitDecode
from confidantd.planner.heads import Curve

Shares = Mapping[str, tuple[int, ...]]  # by unit: groups, or tiles of columns, of each backend


class Samples:
    """Seconds of parts by backend, program and size of share, and what the joins took."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, str], dict[int, list[float]]] = {}
        self._joins: list[float] = []

    def record(
        self, blocks: SplitBlocks | SplitDecode, shares: Shares, wall_seconds: float
    ) -> None:
        """Take the seconds of the last run of each program."""
        slowest: dict[str, float] = {}
        for (index, program), seconds in blocks.seconds.items():
            size = shares[program.split("_")[0]][index]
            sizes = self._seconds.setdefault((index, program), {})
            sizes.setdefault(size, []).append(seconds)
            slowest[program] = max(slowest.get(program, 0.0), seconds)
        self._joins.append((wall_seconds - sum(slowest.values())) / max(1, len(slowest)))

    def join_seconds(self) -> float:
        """What a unit takes beyond its slowest part: waking threads and adding up."""
        return max(0.0, statistics.median(self._joins))

    def curve(self, index: int, name: str, unit: str, *, again: bool) -> Curve:
        """One backend's curve; with `again` the backward includes what is computed again."""
        forward = self.medians(index, f"{unit}_forward")
        backward = self.medians(index, f"{unit}_backward")
        if again:
            more = forward if unit == ATTENTION else self.medians(index, f"{unit}_recompute")
            backward = {size: s + more.get(size, 0.0) for size, s in backward.items()}
        return Curve(name, tuple(sorted(forward.items())), tuple(sorted(backward.items())))

    def medians(self, index: int, program: str) -> dict[int, float]:
        """Median seconds of one backend's runs of a program, by size of share."""
        found = self._seconds.get((index, program), {})
        return {size: statistics.median(seconds) for size, seconds in found.items()}
