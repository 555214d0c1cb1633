"""The head's tokens over several backends: the same loss and gradients, whatever fails and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confidantd.config import Split
from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.split.head import SplitHead
from confidantd.engine.split.head_ways import Way, to_json, ways_of
from confidantd.engine.split.team import Team
from confidantd.engine.trained_weights import Group, StageWeights
from confidantd.errors import BackendError
from confidantd.models.spec import ProgramRequest
from confidantd.wire.stage import StageSpec
from tests.component.engine_models import ROWS, TOKENS, reader, save_model, stage_specs
from tests.component.split_support import Heard
from tests.component.test_split_blocks import Failing, Wrong
from tests.programs import programs_for

TOLERANCE = 1e-5
ALL = ROWS * TOKENS


class HeadModel:
    """A small model's head."""

    def __init__(self, folder: Path) -> None:
        model = save_model("llama", folder)
        request = ProgramRequest(model.spec, "train", "full", None, ROWS, TOKENS)
        self.programs = programs_for(request)
        self.spec: StageSpec
        (self.spec,) = stage_specs(model, 1, training="full")
        self.head: Group = StageWeights(self.spec, reader(model.tensors), None).head
        self.heard = Heard()

    @contextmanager
    def team(self, backends: Sequence[Backend]) -> Iterator[Team]:
        """Backends with one thread each."""
        team = Team(backends, self.programs, len(backends), self.heard)
        try:
            yield team
        finally:
            team.close()

    def split(self, team: Team, way: Way | None, split: Split = "auto") -> SplitHead:
        """A measured head, made to run one way."""
        for trained in self.head.trained.values():
            trained.clear()  # a stage is loaded without gradients
        found = SplitHead(self.spec, self.head, team, self.heard, self.heard, split)
        if way is not None:
            found._way = way
        return found

    def run(self, head: SplitHead) -> list[np.ndarray[Any, Any]]:
        """Loss, gradient by the hidden states, and those of the weights, of two microbatches."""
        for trained in self.head.trained.values():
            trained.clear()
        generator = np.random.default_rng(2)
        found: list[Any] = []
        for _ in range(2):
            x = generator.standard_normal((ROWS, TOKENS, self.spec.model.block.hidden), np.float32)
            labels = generator.integers(0, 61, (ROWS, TOKENS))
            loss, dx = head.run(x, labels, np.array(0.1, np.float32), self.head)
            found += [np.array(loss), dx]
        gradients = [trained.gradient for trained in self.head.trained.values()]
        return [*found, *(np.array(gradient) for gradient in gradients)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    """Compiled once."""
    return HeadModel(tmp_path_factory.mktemp("head"))


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    """Within rounding of each tensor's largest element."""
    for one, other in zip(found, wanted, strict=True):
        assert float(np.abs(one - other).max()) <= TOLERANCE * float(np.abs(other).max())


def whole(model: HeadModel) -> list[Any]:
    """All rows on the CPU."""
    with model.team([CpuBackend()]) as team:
        return model.run(model.split(team, None))


@pytest.mark.parametrize("good_runs", range(3))
def test_rows_are_done_again_where_a_backend_fails(model: HeadModel, good_runs: int) -> None:
    wanted = whole(model)
    model.heard.notices.clear()
    failing = Failing(1_000)
    way = Way((("cpu", 10), ("failing", 14)))
    with model.team([CpuBackend(), failing]) as team:
        head = model.split(team, way)
        failing.left = good_runs
        assert_equal(model.run(head), wanted)
        assert team.left_out == (["failing"] if good_runs < 2 else [])
    assert len(model.heard.notices) == len(team.left_out)


def test_a_backend_that_failed_in_the_blocks_gets_no_rows(model: HeadModel) -> None:
    """Also when the head was measured while it was still there."""
    wanted = whole(model)
    failing = Failing(1_000)
    with model.team([CpuBackend(), failing]) as team:
        head = model.split(team, Way((("cpu", 10), ("failing", 14))))
        team.leave_out("failing", BackendError("the driver is gone"))
        failing.left = 0
        assert_equal(model.run(head), wanted)


def test_only_the_backend_that_failed_is_left_out(model: HeadModel) -> None:
    wanted = whole(model)
    first, second = Failing(1_000), Failing(1_000)
    first.name, second.name = "first", "second"
    with model.team([CpuBackend(), first, second]) as team:
        head = model.split(team, Way((("first", 10), ("second", 14))))
        second.left = 0
        assert_equal(model.run(head), wanted)
        assert team.left_out == ["second"]


def test_whole_heads_only_where_nothing_may_be_shared(model: HeadModel) -> None:
    """Of remembered times in which sharing is fastest."""
    backends = [CpuBackend(), Failing(1_000)]
    names = ("cpu", "failing")
    ways = tuple(ways_of(ALL, names))
    for split in ("auto", "never"):
        model.heard.kept = to_json(ways, [0.2 if way.alone else 0.1 for way in ways])
        with model.team(backends) as team:
            assert model.split(team, None, split)._way.alone == (split == "never")


def test_a_way_that_comes_out_wrong_now_is_not_taken(model: HeadModel) -> None:
    """It was right when it was measured, under another driver."""
    wanted = whole(model)
    wrong = Wrong("dx")
    ways = tuple(ways_of(ALL, ("cpu", "wrong")))
    model.heard.kept = to_json(ways, [0.2 if way.alone else 0.1 for way in ways])
    with model.team([CpuBackend(), wrong]) as team:
        assert_equal(model.run(model.split(team, None)), wanted)


def test_what_was_measured_is_remembered(model: HeadModel) -> None:
    """It is not measured to choose again; and another set of backends is measured anew."""
    model.heard.kept = None
    counted = Failing(1_000)
    with model.team([CpuBackend(), counted]) as team:
        first = model.split(team, None)._way
        assert model.heard.measured == (8, 8)
        model.heard.measured = (0, 0)
        assert model.split(team, None)._way == first
        assert model.heard.measured == (0, 0)
    counted.name = "another"
    with model.team([CpuBackend(), counted]) as team:
        model.split(team, None)
        assert model.heard.measured == (8, 8)
