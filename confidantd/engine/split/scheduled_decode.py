"""The blocks of a generating stage, run the way that measured fastest.

The first time a block of this shape is seen, every backend is measured; the answer is
remembered. A backend that fails is left out, and the others share out its work.
"""

from __future__ import annotations

from collections.abc import Sequence

from confidantd.config import Split
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.split.blocks import ATTENTION, MLP
from confidantd.engine.split.choice import Memory, announce, chosen_parts, remembered
from confidantd.engine.split.decode import SplitDecode
from confidantd.engine.split.decode_blocks import BLOCK_PROGRAM, DecodeRunner, FusedDecode
from confidantd.engine.split.decode_profile import DecodeBench, leave_out_wrong, measure_decode
from confidantd.engine.split.kv_cache import SequenceCache
from confidantd.engine.split.proof import check
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.planner.heads import BlockSplit
from confidantd.planner.split_choice import BlockProfile, choose_block, to_json
from confidantd.wire.stage import StageSpec

LEAST_BLOCK_SECONDS = 0.0005  # of one position; below this, waking threads costs too much


class ScheduledDecode:
    """A `DecodeRunner` that chooses another one, and chooses again when a backend fails."""

    def __init__(
        self,
        spec: StageSpec,
        blocks: Sequence[Group],
        team: Team,
        memory: Memory,
        report: Report,
        split: Split = "auto",
    ) -> None:
        self._model = spec.model
        self._bench = DecodeBench.of(spec, blocks)
        self._split = split
        self._team = team
        self._report = report
        self._runner: DecodeRunner
        found = remembered(memory, team, split)
        if found is None:
            least = 0.0 if split == "always" else LEAST_BLOCK_SECONDS
            found = measure_decode(self._bench, team, report, least)
            if not team.left_out:
                memory.write(to_json(found))
        self._adopt(found)

    def _adopt(self, profile: BlockProfile) -> None:
        """Choose between the backends that are left, and run this way from now on; again
        without one that computes something else in it.
        """
        before = len(self._team.left_out)
        self._profile = profile.without(self._team.left_out)
        block = self._model.block
        choice = choose_block(self._profile, block.kv_heads, block.columns, self._split)
        self._alone = choice.alone
        self._runner = self._made(choice)
        self._leave_out_wrong(choice)
        if len(self._team.left_out) > before:
            self._adopt(self._profile)
            return
        self._left_out = before
        announce(choice, block, self._report)

    def _made(self, choice: BlockSplit) -> DecodeRunner:
        # what was only measured takes memory that the stage was not granted
        self._team.drop_whole(kept=choice.alone)
        if choice.alone is not None:
            self._team.drop_parts()
            return self._fused(choice.alone)
        parts = chosen_parts(choice, self._model, None, self._team)
        return SplitDecode(parts, self._team.cpu, self._team.leave_out)

    def _leave_out_wrong(self, choice: BlockSplit) -> None:
        """Leave out what gives something else on one block than the CPU alone."""
        if choice.alone == CpuBackend.name or choice.alone in self._team.left_out:
            return
        right = self._bench.results(self._fused(CpuBackend.name))
        if choice.alone is None:
            shares = {ATTENTION: choice.attention, MLP: choice.mlp}
            runner, names = self._runner, choice.backends
            leave_out_wrong(self._bench, self._team, names, shares, runner, right)
        else:
            try:
                check(choice.alone, self._bench.results(self._runner), right)
            except BackendError as failure:
                self._team.leave_out(choice.alone, failure)
        self._team.drop_whole(kept=choice.alone)

    def _fused(self, name: str) -> FusedDecode:
        try:
            return FusedDecode(self._team.whole(name).get(BLOCK_PROGRAM))
        except BackendError as failure:
            if name == CpuBackend.name:
                raise
            self._team.leave_out(name, failure)
            return self._fused(CpuBackend.name)

    def forward(self, x: Floats, layer: int, block: Group, cache: SequenceCache) -> Floats:
        """As the chosen runner; without a backend that fails in it."""
        try:
            y = self._runner.forward(x, layer, block, cache)
        except BackendError as failure:
            if self._alone in (None, CpuBackend.name):
                raise
            self._team.leave_out(self._alone, failure)
            self._runner = self._fused(CpuBackend.name)
            y = self._runner.forward(x, layer, block, cache)
        if len(self._team.left_out) > self._left_out:
            self._adopt(self._profile)
        return y
