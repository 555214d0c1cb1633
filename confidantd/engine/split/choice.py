"""What a choice of shares is made from and leads to, in training and in generation."""

from __future__ import annotations

from typing import Protocol

from confidantd.config import Split
from confidantd.engine.split.blocks import ATTENTION, MLP, Part
from confidantd.engine.split.plan import make_parts
from confidantd.engine.split.profile import placement_of
from confidantd.engine.split.team import Report, Team
from confidantd.models.spec import BlockSpec, LoraSpec, ModelSpec
from confidantd.planner.heads import BlockSplit
from confidantd.planner.split_choice import BlockProfile, from_json, shares_of
from confidantd.wire.stage import BackendShare
from confidantd.wire.worker import SplitChosen


class Memory(Protocol):
    """Where the profile of a block shape is kept."""

    def read(self) -> bytes | None:
        """What was written last; None if nothing was."""
        ...

    def write(self, data: bytes) -> None:
        """Remember."""
        ...

    def of_head(self) -> Memory:
        """Where the profile of the head beside these blocks is kept."""
        ...


def remembered(memory: Memory, team: Team, split: Split) -> BlockProfile | None:
    """What was measured before, if that was these backends, and shares where they must be."""
    data = memory.read()
    found = None if data is None else from_json(data)
    if found is None or found.backends != set(team.names):
        return None
    return None if split == "always" and found.curves is None else found


def chosen_parts(
    choice: BlockSplit, model: ModelSpec, lora: LoraSpec | None, team: Team
) -> list[Part]:
    """The parts of a split; programs of other sizes are forgotten."""
    placement = placement_of({ATTENTION: choice.attention, MLP: choice.mlp}, model.block.columns)
    programs = [team.parts(name) for name in choice.backends]
    for index, made in enumerate(programs):
        made.drop_all_but(placement.of(index))
    threads = [team.thread(name) for name in choice.backends]
    return make_parts(model, lora, programs, threads, placement)


def announce(choice: BlockSplit, block: BlockSpec, report: Report) -> None:
    """Say who computes what from now on."""
    shares = shares_of(choice, block.heads, block.kv_heads, block.columns)
    found = tuple(BackendShare(*share) for share in shares)
    report.chosen(SplitChosen(found, choice.seconds))
