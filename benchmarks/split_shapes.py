"""Two backends on one block: alone with the other core busy, together, and torch beside them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.block_sides import BlockCase, TorchBlock
from benchmarks.engine_step import Forgetful
from benchmarks.quiet import Quiet
from benchmarks.windows import Side, interleave, medians
from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.backends.registry import load_backends
from confidantd.engine.split.blocks import ATTENTION, MLP
from confidantd.engine.split.plan import Placement
from confidantd.engine.split.profile import measure_together, placement_of
from confidantd.engine.split.scheduled import ScheduledBlocks
from confidantd.engine.split.team import Team
from confidantd.errors import BackendError
from confidantd.planner.heads import best_split, tiles

TORCH_CORE = 0


def two_backends() -> list[Backend]:
    """The CPU's and the first other one that works here."""
    for backend in load_backends()[0][1:]:
        try:
            backend.probe()
        except BackendError as failure:
            print(f"{backend.name}: {failure}", file=sys.stderr)
        else:
            return [CpuBackend(), backend]
    sys.exit("a second backend is needed, for example: pip install plugins/openvino")


@dataclass(frozen=True)
class Shape:
    """What one unit of one width gave: seconds, shares and the prediction."""

    hidden: int
    unit: str
    split_seconds: float
    single_seconds: dict[str, float]
    torch_seconds: float
    predicted_seconds: float | None
    shares: dict[str, tuple[int, int]]  # heads and columns by backend
    split_halves: tuple[float, ...] = ()  # seconds of forward and backward
    single_halves: tuple[tuple[float, ...], ...] = ()  # of each backend

    @property
    def name(self) -> str:
        """For a claim."""
        return f"{self.unit} of {self.hidden}"

    @property
    def best_single(self) -> float:
        """The faster backend, with the other core busy."""
        return min(self.single_seconds.values())

    @property
    def gain(self) -> float:
        """How many times faster the split is than the best backend alone."""
        return self.best_single / self.split_seconds

    @property
    def ideal(self) -> float:
        """Both rates together over the better one."""
        return sum(self.best_single / seconds for seconds in self.single_seconds.values())

    @property
    def half_shares(self) -> tuple[float, ...]:
        """Share of the ideal gain in forward and in backward, each for itself."""
        singles = zip(*self.single_halves, strict=True)
        return tuple(
            1 / (split * sum(1 / single for single in both))
            for split, both in zip(self.split_halves, singles, strict=True)
        )


class SplitBench:
    """The two backends on one block, one thread and one core each."""

    def __init__(self, hidden: int, backends: Sequence[Backend]) -> None:
        self.hidden = hidden
        self.case, self._other = BlockCase.make(hidden), BlockCase.make(hidden)
        self.team = Team(backends, self.case.programs, len(backends), Quiet())
        curves = measure_together(self.case.bench, self.team, Quiet())
        join = curves.join_seconds
        self._attention = best_split(self.case.groups, curves.attention, join, 2)
        self._mlp = best_split(len(tiles(self.case.columns)), curves.mlp, join, 2)

    def placement(self) -> Placement:
        """The scheduler's shares."""
        shares = {ATTENTION: self._attention.shares, MLP: self._mlp.shares}
        return placement_of(shares, self.case.columns)

    def shares(self) -> dict[str, tuple[int, int]]:
        """Query heads and MLP columns by backend."""
        counts, block = self.placement().counts, self.case.model.spec.block
        heads = block.heads // block.kv_heads
        pairs = zip(counts[ATTENTION], counts[MLP], strict=True)
        return {
            name: (groups * heads, columns)
            for name, (groups, columns) in zip(self.team.names, pairs, strict=True)
        }

    def _only(self, index: int) -> Placement:
        counts = {ATTENTION: self.case.groups, MLP: self.case.columns}
        return Placement(
            {u: tuple(n if i == index else 0 for i in range(2)) for u, n in counts.items()}
        )

    def shapes(self, rounds: int, window_seconds: float) -> Iterator[Shape]:
        """Attention, then the whole block."""
        torch_block = TorchBlock(self.hidden)
        cpu, other = self.team.names
        split = self.case.split(self.team, self.placement())
        first, second = self.case, self._other
        attention = second.attention(second.split(self.team, self._only(1)))
        yield self._measured(
            "attention",
            {
                "split": Side(first.attention(split)),
                "alone": Side(
                    first.attention(first.split(self.team, self._only(0))), companion=attention
                ),
                "torch": Side(torch_block.attention, TORCH_CORE, attention),
            },
            self._attention.seconds,
            rounds,
            window_seconds,
        )
        whole = second.fused(self.team, other)
        yield self._measured(
            "block",
            {
                "split": Side(first.whole(split)),
                "alone": Side(first.fused(self.team, cpu), companion=whole),
                "torch": Side(torch_block.whole, TORCH_CORE, whole),
            },
            self._attention.seconds + self._mlp.seconds,
            rounds,
            window_seconds,
        )

    def _measured(
        self, unit: str, sides: dict[str, Side], predicted: float, rounds: int, seconds: float
    ) -> Shape:
        interleave(sides, rounds, seconds)
        alone = sides["alone"]
        single = dict(zip(self.team.names, (alone.median, alone.companion_median), strict=True))
        torch_seconds = sides["torch"].median
        split = sides["split"].median
        halves = (medians(alone.halves), medians(alone.companion_halves))
        return Shape(
            self.hidden, unit, split, single, torch_seconds, predicted, self.shares(),
            medians(sides["split"].halves), halves,
        )  # fmt: skip

    def close(self) -> None:
        """End the backends' threads."""
        self.team.close()


def scheduled(hidden: int, backends: Sequence[Backend], rounds: int, seconds: float) -> Shape:
    """A block the way the scheduler answers, and each backend alone: both with all threads, one
    for each backend, as a device without a second backend would use them.
    """
    case = BlockCase.make(hidden)
    bench, heard = case.bench, Quiet()
    team = Team(backends, case.programs, len(backends), heard)
    blocks = ScheduledBlocks(bench.spec, bench.block, team, Forgetful(), heard)
    single = Team(backends, case.programs, len(backends), heard)
    alone = {name: single.fused(name) for name in single.names}
    sides = {"split": Side(lambda: bench.time(blocks))}
    for name, runner in alone.items():
        sides[name] = Side(functools.partial(bench.time, runner))
    interleave(sides, rounds, seconds)
    for each in (team, single):
        each.close()
    assert heard.split is not None
    return Shape(
        hidden, "scheduled block", sides["split"].median,
        {name: sides[name].median for name in alone}, 0.0, heard.split.seconds,
        {share.name: (share.heads, share.columns) for share in heard.split.shares},
    )  # fmt: skip
