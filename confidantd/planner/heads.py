"""Who computes which head groups and MLP columns inside one device; pure.

A block runs whole on one backend, or its attention is cut into head groups (a GQA group
is the unit) and its MLP into tiles of columns, which backends compute at the same time.
A unit then takes, forward and backward each, as long as its slowest part, and a join.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_PROBES = 12  # compositions measured together: a few seconds for a block of 768 x 512 tokens
MOST_TILES = 16
TILE_MULTIPLE = 16  # columns; vector units work on whole registers
LEAST_GAIN = 0.03  # a split that only ties costs threads and heat

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one backend at shares of several sizes, measured while the others work.

    Copies in and out are included. Points are in ascending order of size.
    """

    backend: str
    forward: Points
    backward: Points


@dataclass(frozen=True, slots=True)
class Alone:
    """Seconds of a whole block on one backend."""

    backend: str
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class UnitSplit:
    """Shares of every backend in one unit, and the seconds with joins."""

    shares: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class BlockSplit:
    """How a block runs: whole on `alone`, or in shares (groups, tiles) of `backends`."""

    alone: str | None
    backends: tuple[str, ...]
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    seconds: float

    def same_shares(self, other: BlockSplit) -> bool:
        """Whether both run a block the same way, whatever time that takes."""
        return (self.alone, self.backends, self.attention, self.mlp) == (
            other.alone,
            other.backends,
            other.attention,
            other.mlp,
        )


def tiles(columns: int, most: int = MOST_TILES, multiple: int = TILE_MULTIPLE) -> tuple[int, ...]:
    """Widths of at most `most` tiles: equal multiples of `multiple`, the last takes the rest."""
    units = max(1, columns // multiple)
    width = -(-units // most) * multiple
    count = max(1, columns // width)
    if columns < 2 * multiple:
        return (columns,)
    return (*[width] * (count - 1), columns - width * (count - 1))


def seconds_at(points: Points, size: int) -> float:
    """Linear between measured sizes, and beyond them by the nearest two; 0 for no share.

    A single point scales with the size. Never below zero.
    """
    if size == 0:
        return 0.0
    sizes = [point[0] for point in points]
    if len(points) == 1:
        return points[0][1] * size / points[0][0]
    place = min(max(bisect.bisect_left(sizes, size), 1), len(points) - 1)
    (first, low), (second, high) = points[place - 1], points[place]
    return max(0.0, low + (high - low) * (size - first) / (second - first))


def probes(total: int, backends: int, most: int = MOST_PROBES) -> tuple[tuple[int, ...], ...]:
    """Shares to measure together, so that what backends cost each other is in the curves.

    For each backend, sizes from 1 to all but one; the others share the rest evenly.
    What cannot be shared is measured on each.
    """
    if backends < 2:
        return ()
    if total == 1:
        return tuple(tuple(int(i == j) for j in range(backends)) for i in range(backends))
    sizes = _sizes(total, most)
    found = [
        _around(total, backends, backend, size)
        for backend in range(1 if backends == 2 else backends)
        for size in sizes
    ]
    return tuple(dict.fromkeys(found))


def _sizes(total: int, most: int) -> list[int]:
    """Sizes from 1 to total - 1, evenly, both ends and the middle among them."""
    if total - 1 <= most:
        return list(range(1, total))
    steps = {1 + round(i * (total - 2) / (most - 2)) for i in range(most - 1)}
    return sorted(steps | {total // 2})


def _around(total: int, backends: int, backend: int, size: int) -> tuple[int, ...]:
    rest, others = total - size, backends - 1
    even = [rest // others + (1 if i < rest % others else 0) for i in range(others)]
    return (*even[:backend], size, *even[backend:])


def best_split(
    total: int, curves: Sequence[Curve], join_seconds: float, least_backends: int = 1
) -> UnitSplit:
    """The shares with the least seconds; of equals with fewer backends, then the more even.

    Exact: every way to share `total` is tried, but those with fewer than `least_backends`
    (as far as `total` goes round).
    """
    least = min(least_backends, total, len(curves))
    best: tuple[float, int, int, UnitSplit] | None = None
    for shares, forward, backward in _compositions(total, curves):
        active = sum(share > 0 for share in shares)
        if active < least:
            continue
        join = join_seconds if active > 1 else 0.0
        found = UnitSplit(shares, forward + join, backward + join)
        rank = (found.seconds, active, sum(share * share for share in shares), found)
        if best is None or rank[:3] < best[:3]:
            best = rank
    assert best is not None
    return best[3]


def _compositions(
    total: int, curves: Sequence[Curve]
) -> Iterator[tuple[tuple[int, ...], float, float]]:
    """Every way to share `total`, with the seconds of the slowest forward and backward."""
    tables = [
        [(seconds_at(c.forward, n), seconds_at(c.backward, n)) for n in range(total + 1)]
        for c in curves
    ]
    for cuts in itertools.combinations_with_replacement(range(total + 1), len(curves) - 1):
        borders = (0, *cuts, total)
        shares = tuple(b - a for a, b in itertools.pairwise(borders))
        times = [table[share] for table, share in zip(tables, shares, strict=True)]
        yield shares, max(t[0] for t in times), max(t[1] for t in times)


def choose(
    alone: Sequence[Alone],
    attention: UnitSplit | None,
    mlp: UnitSplit | None,
    names: tuple[str, ...],
    least_gain: float = LEAST_GAIN,
) -> BlockSplit:
    """A split if it beats the fastest backend alone by `least_gain` of its time."""
    best = min(alone, key=lambda a: a.seconds)
    whole = BlockSplit(best.backend, (), (), (), best.seconds)
    if attention is None or mlp is None:
        return whole
    seconds = attention.seconds + mlp.seconds
    shares = zip(attention.shares, mlp.shares, strict=True)
    active = sum(a > 0 or m > 0 for a, m in shares)
    if active < 2 or seconds > best.seconds * (1 - least_gain):
        return whole
    return BlockSplit(None, names, attention.shares, mlp.shares, seconds)
