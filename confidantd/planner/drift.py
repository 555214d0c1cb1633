"""When backends drift away from what was measured of them (heat, load), and what to do; pure.

Each step gives every backend's measured seconds over the predicted ones. The ratios are
smoothed, and only their *differences* count: where all slow down alike, other shares
would not help. A drift must last some steps, each of which shows it, and the new shares
must gain enough, so that noise or one slow step moves nothing back and forth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from confidantd.planner.heads import BlockSplit, Curve, seconds_at
from confidantd.planner.split_choice import BlockCurves, BlockProfile, choose_block

SMOOTHING = 0.4  # weight of the newest step
THRESHOLD = 0.25  # ratios this far apart are a drift
PATIENCE_STEPS = 4
HYSTERESIS = 0.05  # the least gain for which shares are moved


@dataclass(frozen=True, slots=True)
class Drift:
    """Smoothed ratios by backend, and for how many steps in a row they have been apart."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0

    def observe(self, predicted: Mapping[str, float], measured: Mapping[str, float]) -> Drift:
        """After a step: seconds of each backend that has a share.

        A step counts if it is itself apart too: smoothed alone, a single step that is four
        times too slow would look like a drift for `PATIENCE_STEPS`.
        """
        new = {
            name: measured[name] / seconds
            for name, seconds in predicted.items()
            if seconds > 0 and name in measured
        }
        ratios = {
            name: SMOOTHING * ratio + (1 - SMOOTHING) * self.ratios.get(name, 1.0)
            for name, ratio in new.items()
        }
        return Drift(ratios, self.steps + 1 if _apart(ratios) and _apart(new) else 0)

    @property
    def lasting(self) -> bool:
        """Whether it is time to look for other shares."""
        return self.steps >= PATIENCE_STEPS


def _apart(ratios: Mapping[str, float]) -> bool:
    if len(ratios) < 2:  # alone: its own measurement is what it is compared with
        return any(abs(ratio - 1) > THRESHOLD for ratio in ratios.values())
    return max(ratios.values()) > (1 + THRESHOLD) * min(ratios.values())


def backward_seconds(profile: BlockProfile, split: BlockSplit) -> dict[str, float]:
    """Predicted seconds of each backend for the backward of one block, without joins.

    The backward is the longer half, and only training has it, so it is what is compared.
    """
    if split.alone is not None:
        found = {a.backend: a.backward_seconds for a in profile.alone}
        return {split.alone: found[split.alone]}
    curves = profile.curves
    assert curves is not None
    total: dict[str, float] = {}
    for unit, shares in ((curves.attention, split.attention), (curves.mlp, split.mlp)):
        for curve, share in zip(unit, shares, strict=True):
            seconds = seconds_at(curve.backward, share)
            total[curve.backend] = total.get(curve.backend, 0.0) + seconds
    return total


def scaled(profile: BlockProfile, ratios: Mapping[str, float]) -> BlockProfile:
    """The profile as it would be measured now.

    Backends without a share have no ratio. What slows all that have one is taken to slow
    them too; of a backend that runs alone nobody can tell.
    """
    unseen = min(ratios.values()) if len(ratios) > 1 else 1.0
    ratios = defaultdict(lambda: unseen, ratios)
    alone = tuple(
        replace(
            a,
            forward_seconds=a.forward_seconds * ratios[a.backend],
            backward_seconds=a.backward_seconds * ratios[a.backend],
        )
        for a in profile.alone
    )
    curves = profile.curves
    if curves is None:
        return BlockProfile(alone, None)
    return BlockProfile(
        alone,
        BlockCurves(
            tuple(_scaled(c, ratios) for c in curves.attention),
            tuple(_scaled(c, ratios) for c in curves.mlp),
            curves.join_seconds,
        ),
    )


def _scaled(curve: Curve, ratios: Mapping[str, float]) -> Curve:
    ratio = ratios[curve.backend]
    return Curve(
        curve.backend,
        tuple((size, seconds * ratio) for size, seconds in curve.forward),
        tuple((size, seconds * ratio) for size, seconds in curve.backward),
    )


def rebalance(
    now: BlockProfile, current: BlockSplit, groups: int, columns: int, split: str = "auto"
) -> BlockSplit | None:
    """Other shares than `current` if they gain enough under what is measured `now`."""
    best = choose_block(now, groups, columns, split)
    kept = _seconds(now, current)
    moved = not best.same_shares(current)
    return best if moved and best.seconds < kept * (1 - HYSTERESIS) else None


def _seconds(profile: BlockProfile, split: BlockSplit) -> float:
    """What a block takes under `profile` with the shares of `split`."""
    if split.alone is not None:
        return next(a.seconds for a in profile.alone if a.backend == split.alone)
    curves = profile.curves
    assert curves is not None
    total = 0.0
    for unit, shares in ((curves.attention, split.attention), (curves.mlp, split.mlp)):
        pairs = list(zip(unit, shares, strict=True))
        join = curves.join_seconds if sum(share > 0 for share in shares) > 1 else 0.0
        total += max(seconds_at(c.forward, n) for c, n in pairs) + join
        total += max(seconds_at(c.backward, n) for c, n in pairs) + join
    return total
