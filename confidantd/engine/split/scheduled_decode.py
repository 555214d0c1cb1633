"""The blocks of a generating stage, run the way that measured fastest.

The first time a block of this shape is seen, every backend is measured; the answer is
remembered. A backend that fails is left out, and the others share out its work.
"""

from __future__ import annotations

from collections.abc import Sequence

from confidantd.config import Split
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.decode_blocks import BLOCK_PROGRAM, DecodeRunner, FusedDecode
from confidantd.engine.kv_cache import SequenceCache
from confidantd.engine.split.choice import Memory, announce, chosen_parts, remembered
from confidantd.engine.split.decode import SplitDecode
from confidantd.engine.split.decode_profile import DecodeBench, measure_decode
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
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
        self._split = split
        self._team = team
        self._report = report
        found = remembered(memory, team, split)
        if found is None:
            bench = DecodeBench.of(spec, blocks)
            found = measure_decode(
                bench, team, report, 0.0 if split == "always" else LEAST_BLOCK_SECONDS
            )
            if not team.left_out:
                memory.write(to_json(found))
        self._adopt(found)

    def _adopt(self, profile: BlockProfile) -> None:
        """Choose between the backends that are left, and run this way from now on."""
        self._left_out = len(self._team.left_out)
        self._profile = profile.without(self._team.left_out)
        block = self._model.block
        choice = choose_block(self._profile, block.kv_heads, block.columns, self._split)
        self._alone = choice.alone
        self._team.drop_whole(kept=choice.alone)
        self._runner: DecodeRunner
        if choice.alone is None:
            parts = chosen_parts(choice, self._model, None, self._team)
            self._runner = SplitDecode(parts, self._team.cpu, self._team.leave_out)
        else:
            self._team.drop_parts(self._team.names)
            self._runner = self._fused(choice.alone)
        announce(choice, block, self._report)

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
