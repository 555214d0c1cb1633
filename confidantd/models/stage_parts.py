"""What a stage consists of, and what of it stays when its device gets another stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

EMBEDDING: Final = "embedding"
HEAD: Final = "head"
Part = int | Literal["embedding", "head"]  # a layer, or an end of the model


def stage_parts(
    first_layer: int, past_last_layer: int, *, embedding: bool, head: bool
) -> frozenset[Part]:
    """Layers [first, past last) and the ends that are there."""
    found: set[Part] = set(range(first_layer, past_last_layer))
    found |= {EMBEDDING} if embedding else set()
    return frozenset(found | ({HEAD} if head else set()))


def kept_parts(old: frozenset[Part], new: frozenset[Part], *, tied: bool) -> frozenset[Part]:
    """What a device that had `old` needs not load for `new`.

    Both ends of a tied table are one array where they are on one device: they only stay as
    they are if they stay together, or apart.
    """
    both = old & new
    ends = {EMBEDDING, HEAD}
    if tied and old & ends != new & ends:
        return both - ends
    return both


def ordered(parts: Iterable[Part]) -> list[Part]:
    """Layers in order, then the ends."""
    return sorted(parts, key=lambda part: (isinstance(part, str), part))
