"""The blocks of a stage, run the way that measured fastest, for as long as that holds.

The first time a block of this shape is seen, every backend is measured; the answer is
remembered. A backend that fails is left out, and one that drifts away from what was
measured (heat, another program) gives or takes shares between two steps. None of that
changes a number beyond rounding: shares are views of the same weights.
"""

from __future__ import annotations

from confidantd.config import Split
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.blocks import BlockRunner, FusedBlocks, Saved
from confidantd.engine.split.blocks import ATTENTION, MLP, SplitBlocks
from confidantd.engine.split.choice import Memory, announce, chosen_parts, remembered
from confidantd.engine.split.profile import Bench, leave_out_wrong, measure
from confidantd.engine.split.proof import check
from confidantd.engine.split.team import Report, Team
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.planner.drift import Drift, backward_seconds, rebalance, scaled
from confidantd.planner.heads import BlockSplit
from confidantd.planner.split_choice import choose_block, to_json
from confidantd.wire.stage import StageSpec

RETRY_STEPS = 100  # after a move, and twice as many after each further one


class ScheduledBlocks:
    """A `BlockRunner` that chooses another one, and may choose again in `end_step`."""

    def __init__(
        self,
        spec: StageSpec,
        block: Group,
        team: Team,
        memory: Memory,
        report: Report,
        split: Split = "auto",
    ) -> None:
        self._spec = spec
        self._split_when = split
        self._team = team
        self._report = report
        self._bench = Bench.of(spec, block)
        found = remembered(memory, team, split)
        if found is None:
            found = measure(self._bench, team, report, always=split == "always")
            if not team.left_out:
                memory.write(to_json(found))
        self._profile = self._first_profile = found
        self._runner: FusedBlocks | SplitBlocks
        self._steps_to_retry, self._retry_steps = 0, RETRY_STEPS
        self._adopt(self._best())
        team.take_seconds()  # what was measured is no step's

    def _best(self) -> BlockSplit:
        block = self._spec.model.block
        when = self._split_when
        return choose_block(self._profile, block.kv_heads, block.columns, when)

    def _adopt(self, choice: BlockSplit) -> None:
        """Run this way from now on, or without a backend that computes something else in it:
        what is remembered was right under another driver, or with other shares.
        """
        before = len(self._team.left_out)
        self._runner = self._made(choice)
        self._leave_out_wrong(choice)
        self._runner.take_backward_seconds()  # of the check
        self._profile = self._profile.without(self._team.left_out)
        if len(self._team.left_out) > before:
            self._adopt(self._best())
            return
        self._left_out = len(self._team.left_out)
        self._choice, self._drift = choice, Drift()
        announce(choice, self._spec.model.block, self._report)

    def _made(self, choice: BlockSplit) -> FusedBlocks | SplitBlocks:
        # what was only measured takes memory that the stage was not granted
        self._team.drop_whole(kept=choice.alone)
        if choice.alone:
            self._team.drop_parts()
            return self._fused(choice.alone)
        return self._split(choice)

    def _leave_out_wrong(self, choice: BlockSplit) -> None:
        """Leave out what gives something else on one block than the CPU alone."""
        if choice.alone == CpuBackend.name:
            return
        right = self._bench.results(self._team.fused(CpuBackend.name))
        if choice.alone is None:
            shares = {ATTENTION: choice.attention, MLP: choice.mlp}
            runner, names = self._runner, choice.backends
            leave_out_wrong(self._bench, self._team, names, shares, runner, right)
        elif choice.alone not in self._team.left_out:
            try:
                check(choice.alone, self._bench.results(self._runner), right)
            except BackendError as failure:
                self._team.leave_out(choice.alone, failure)
        self._team.drop_whole(kept=choice.alone)

    def _fused(self, name: str) -> FusedBlocks:
        try:
            return self._team.fused(name)
        except BackendError as failure:
            if name == CpuBackend.name:
                raise
            self._team.leave_out(name, failure)
            return self._fused(CpuBackend.name)

    def _split(self, choice: BlockSplit) -> SplitBlocks:
        parts = chosen_parts(choice, self._spec.model, self._spec.lora, self._team)
        return SplitBlocks(parts, self._team.cpu, self._team.leave_out)

    def forward(self, x: Floats, block: Group, *, keep: bool) -> tuple[Floats, Saved | None]:
        """As the chosen runner; where a backend that runs alone fails, again on the CPU."""
        try:
            return self._runner.forward(x, block, keep=keep)
        except BackendError as failure:
            return self._without(failure).forward(x, block, keep=keep)

    def backward(self, dy: Floats, x: Floats, saved: Saved | None, block: Group) -> Floats:
        """As `forward`."""
        try:
            return self._runner.backward(dy, x, saved, block)
        except BackendError as failure:
            return self._without(failure).backward(dy, x, saved, block)

    def _without(self, failure: BackendError) -> BlockRunner:
        """The CPU takes over from the backend that ran whole blocks."""
        if self._choice.alone in (None, CpuBackend.name, *self._team.left_out):
            raise failure
        assert self._choice.alone is not None
        self._team.leave_out(self._choice.alone, failure)
        self._runner = self._fused(CpuBackend.name)
        return self._runner

    def end_step(self) -> None:
        """Between two steps: go on without what failed, and follow what drifted."""
        if len(self._team.left_out) > self._left_out:
            self._profile = self._profile.without(self._team.left_out)
            self._adopt(self._best())
            return
        predicted = backward_seconds(self._profile, self._choice)
        self._drift = self._drift.observe(predicted, self._runner.take_backward_seconds())
        if self._drift.lasting:
            self._move()
        elif self._steps_to_retry:
            self._steps_to_retry -= 1
            if self._steps_to_retry == 0:
                self._retry()

    def _retry(self) -> None:
        """What was slow may have recovered: it is only seen at work, so it gets work again."""
        self._profile = self._first_profile.without(self._team.left_out)
        found = self._best()
        if not found.same_shares(self._choice):
            self._adopt(found)

    def _move(self) -> None:
        """Look for other shares under the speeds of now."""
        self._profile = scaled(self._profile, self._drift.ratios)
        self._drift = Drift()
        block = self._spec.model.block
        when = self._split_when
        found = rebalance(self._profile, self._choice, block.kv_heads, block.columns, when)
        if found is not None:
            self._steps_to_retry, self._retry_steps = self._retry_steps, 2 * self._retry_steps
            self._report.notice("backends-moved", "backends changed speed: work is shared anew")
            self._adopt(found)

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each backend has computed since the last call."""
        return self._team.take_seconds()
