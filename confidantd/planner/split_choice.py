"""From measured curves of a block to the way it runs; and as JSON, to be remembered."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from confidantd.planner.heads import Alone, BlockSplit, Curve, Points, best_split, choose, tiles


@dataclass(frozen=True, slots=True)
class BlockCurves:
    """Curves of every backend over head groups and over tiles of MLP columns."""

    attention: tuple[Curve, ...]
    mlp: tuple[Curve, ...]
    join_seconds: float


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """What was measured of a block: whole on each backend, and in shares if that was tried."""

    alone: tuple[Alone, ...]
    curves: BlockCurves | None

    @property
    def backends(self) -> set[str]:
        """Names of all that were measured."""
        return {alone.backend for alone in self.alone}

    def without(self, left_out: Collection[str]) -> BlockProfile:
        """What is left when some backends are gone: shares only where at least two are."""
        curves = self.curves
        if curves is not None:
            curves = BlockCurves(
                tuple(c for c in curves.attention if c.backend not in left_out),
                tuple(c for c in curves.mlp if c.backend not in left_out),
                curves.join_seconds,
            )
        alone = tuple(a for a in self.alone if a.backend not in left_out)
        return BlockProfile(alone, curves if curves and len(curves.attention) > 1 else None)


def choose_block(
    profile: BlockProfile, groups: int, columns: int, split: str = "auto"
) -> BlockSplit:
    """The fastest way to run a block of so many head groups and MLP columns.

    `split`: `auto` compares all ways, `never` only whole blocks, `always` only splits.
    """
    curves = profile.curves
    if curves is None or split == "never":
        return choose(profile.alone, None, None, ())
    names = tuple(curve.backend for curve in curves.attention)
    least = 2 if split == "always" else 1
    attention = best_split(groups, curves.attention, curves.join_seconds, least)
    mlp = best_split(len(tiles(columns)), curves.mlp, curves.join_seconds, least)
    if split == "always":
        seconds = attention.seconds + mlp.seconds
        return BlockSplit(None, names, attention.shares, mlp.shares, seconds)
    return choose(profile.alone, attention, mlp, names)


def columns_of(shares: Sequence[int], columns: int) -> tuple[int, ...]:
    """Tiles of each backend as columns."""
    widths = iter(tiles(columns))
    return tuple(sum(next(widths) for _ in range(share)) for share in shares)


def shares_of(
    split: BlockSplit, heads: int, kv_heads: int, columns: int
) -> list[tuple[str, int, int]]:
    """(backend, query heads, MLP columns) of each backend that has a share."""
    if split.alone is not None:
        return [(split.alone, heads, columns)]
    found = zip(
        split.backends,
        (groups * (heads // kv_heads) for groups in split.attention),
        columns_of(split.mlp, columns),
        strict=True,
    )
    return [share for share in found if share[1] or share[2]]


def to_json(profile: BlockProfile) -> bytes:
    """The profile as a file."""
    return json.dumps(asdict(profile), indent=1).encode()


def from_json(data: bytes) -> BlockProfile | None:
    """The profile in a file; None if it is none that a choice can be made by."""
    try:
        fields = json.loads(data)
        alone = tuple(map(_alone, fields["alone"]))
        curves = None if fields["curves"] is None else _curves(fields["curves"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    names = [a.backend for a in alone]
    units = () if curves is None else (curves.attention, curves.mlp)
    if not names or any([curve.backend for curve in unit] != names for unit in units):
        return None
    return BlockProfile(alone, curves)


def _curves(fields: dict[str, Any]) -> BlockCurves:
    attention, mlp = (tuple(map(_curve, fields[unit])) for unit in ("attention", "mlp"))
    return BlockCurves(attention, mlp, _seconds(fields["join_seconds"]))


def _alone(fields: dict[str, Any]) -> Alone:
    forward, backward = fields["forward_seconds"], fields["backward_seconds"]
    return Alone(str(fields["backend"]), _seconds(forward), _seconds(backward))


def _curve(fields: dict[str, Any]) -> Curve:
    forward, backward = _points(fields["forward"]), _points(fields["backward"])
    return Curve(str(fields["backend"]), forward, backward)


def _points(found: list[tuple[Any, Any]]) -> Points:
    points = tuple((int(size), _seconds(seconds)) for size, seconds in found)
    sizes = [size for size, _ in points]
    if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
        raise ValueError("sizes are not in ascending order")
    return points


def _seconds(found: Any) -> float:
    seconds = float(found)
    if not 0 <= seconds < math.inf:
        raise ValueError("not a time")
    return seconds
