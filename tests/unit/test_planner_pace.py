"""The closed form of a step's time beside the event simulation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.planner.pace import NOTHING, before, behind, step_seconds
from confidantd.planner.simulate import LinkCost, StageCost, simulate
from confidantd.schedule.one_f_one_b import in_flight

FORWARDS = st.lists(st.floats(0.2, 1.0), min_size=1, max_size=8)
MICROBATCHES = st.integers(1, 32)


def closed(stages: Sequence[StageCost], links: Sequence[LinkCost], microbatches: int) -> float:
    """As the planner builds it up."""
    suffix, count = NOTHING, len(stages)
    for index in range(count - 1, -1, -1):
        if index < count - 1:
            suffix = behind(suffix, links[index], microbatches)
        stage = stages[index]
        flying = in_flight(index, count, microbatches)
        both = stage.forward + stage.backward
        suffix = before(suffix, stage.forward, both, flying, microbatches)
    return step_seconds(suffix, microbatches)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("microbatches", [1, 2, 7, 32])
def test_equal_stages_are_exact(stages: int, microbatches: int) -> None:
    equal = [StageCost(1.0, 2.0)] * stages
    found = closed(equal, [LinkCost()] * (stages - 1), microbatches)
    assert found == pytest.approx((microbatches + stages - 1) * 3.0)


@given(forwards=FORWARDS, microbatches=MICROBATCHES)
def test_without_links_it_is_close_from_below(forwards: list[float], microbatches: int) -> None:
    stages = [StageCost(f, 2 * f) for f in forwards]
    links = [LinkCost()] * (len(stages) - 1)
    simulated = simulate(stages, links, microbatches).seconds
    assert 0.9 * simulated <= closed(stages, links, microbatches) <= simulated * (1 + 1e-9)


@given(
    forwards=FORWARDS,
    links=st.lists(st.builds(LinkCost, st.floats(0, 2), st.floats(0, 2)), min_size=7, max_size=7),
    microbatches=MICROBATCHES,
)
def test_with_slow_links_it_is_not_far_off(
    forwards: list[float], links: list[LinkCost], microbatches: int
) -> None:
    stages = [StageCost(f, 2 * f) for f in forwards]
    links = links[: len(stages) - 1]
    simulated = simulate(stages, links, microbatches).seconds
    assert 0.5 * simulated <= closed(stages, links, microbatches) <= 1.2 * simulated
