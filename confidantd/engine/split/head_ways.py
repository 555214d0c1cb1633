"""The ways to share the tokens of the head out, and what is remembered of their times."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from confidantd.config import Split
from confidantd.engine.split.choice import Memory
from confidantd.planner.heads import LEAST_GAIN

MOST_WAYS = 6  # compositions that are measured
TILES = 8  # that tokens are shared out in: an eighth of a head is what a share may be off


@dataclass(frozen=True, slots=True, order=True)
class Way:
    """Backends and their tokens; with `alone` the one backend has all, and all threads."""

    shares: tuple[tuple[str, int], ...]
    alone: bool = False


def to_json(ways: Sequence[Way], seconds: Sequence[float | None]) -> bytes:
    """What was measured, to be remembered."""
    return json.dumps({"ways": [asdict(way) for way in ways], "seconds": seconds}).encode()


def remembered_seconds(memory: Memory, ways: Sequence[Way]) -> list[float | None] | None:
    """Seconds of each way, if they were measured of just these ways."""
    try:
        found = json.loads(memory.read() or b"null")
        same = found["ways"] == json.loads(to_json(ways, ()))["ways"]
        seconds = [None if s is None else float(s) for s in found["seconds"]]
    except (ValueError, KeyError, TypeError):
        return None
    cpu = seconds[0] if len(seconds) == len(ways) else None
    return seconds if same and cpu is not None else None


def ways_of(tokens: int, names: tuple[str, ...]) -> Iterator[Way]:
    """Each backend alone, then the more even compositions of two or more."""
    yield from (Way(((name, tokens),), alone=True) for name in names)
    tiles = min(TILES, tokens)
    ends = [tokens * tile // tiles for tile in range(tiles + 1)]
    cuts = itertools.combinations_with_replacement(range(tiles + 1), len(names) - 1)
    found = [
        tuple(ends[b] - ends[a] for a, b in itertools.pairwise((0, *cut, tiles))) for cut in cuts
    ]
    shared = [shares for shares in found if sum(share > 0 for share in shares) > 1]
    shared.sort(key=lambda shares: sum(share * share for share in shares))
    for shares in shared[:MOST_WAYS]:
        yield Way(tuple(zip(names, shares, strict=True)))


def best_way(ways: Sequence[Way], seconds: Sequence[float | None], split: Split) -> Way:
    """The fastest one; shared only where that gains enough, and never if `split` says so."""
    worked = [(s, way) for way, s in zip(ways, seconds, strict=True) if s is not None]
    alone = min((s, way) for s, way in worked if way.alone)
    best = alone if split == "never" else min(worked)
    return best[1] if best[0] < (1 - LEAST_GAIN) * alone[0] else alone[1]
