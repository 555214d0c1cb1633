"""From measured curves of a block to the way it runs; and as JSON, to be remembered."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from confidantd.planner.heads import Alone, BlockSplit, Curve, best_split, choose, tiles


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
    """The profile in a file; None if it is none."""
    try:
        fields = json.loads(data)
        curves = fields["curves"]
        return BlockProfile(
            tuple(Alone(**alone) for alone in fields["alone"]),
            None
            if curves is None
            else BlockCurves(
                tuple(map(_curve, curves["attention"])),
                tuple(map(_curve, curves["mlp"])),
                float(curves["join_seconds"]),
            ),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _curve(fields: dict[str, Any]) -> Curve:
    return Curve(
        str(fields["backend"]),
        tuple((int(size), float(seconds)) for size, seconds in fields["forward"]),
        tuple((int(size), float(seconds)) for size, seconds in fields["backward"]),
    )
