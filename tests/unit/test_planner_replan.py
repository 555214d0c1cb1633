"""When a job moves to another plan, and what moves then."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.ids import DeviceId
from confidantd.jobs.moving import exports, wanted
from confidantd.models.stage_parts import EMBEDDING, HEAD, kept_parts, stage_parts
from confidantd.planner.plan import StagePlan
from confidantd.planner.replan import (
    FIRST_PAUSE_STEPS,
    STANDSTILL_SECONDS,
    Watch,
    continued,
    standstill_seconds,
    worth_moving,
)
from tests.unit.planner_support import device, make_plan, workload

PLANNED = {"0": 1.0, "1": 1.0}
THROTTLED = {"0": 1.0, "1": 3.0}
LAYERS = 6


def steps_until_due(watch: Watch, measured: dict[str, float], most: int = 100) -> int:
    """How many steps like that it takes."""
    for step in range(1, most + 1):
        watch = watch.observe(measured)
        if watch.due:
            return step
    return most + 1


def test_a_stage_at_a_third_of_its_speed_is_noticed_soon() -> None:
    assert steps_until_due(Watch(PLANNED), THROTTLED) <= 8


@pytest.mark.parametrize("measured", [{"0": 1.1, "1": 0.95}, {"0": 3.0, "1": 3.0}])
def test_noise_and_what_slows_all_alike_are_no_reason(measured: dict[str, float]) -> None:
    assert steps_until_due(Watch(PLANNED), measured) > 100


def test_one_slow_step_is_no_reason() -> None:
    watch = Watch(PLANNED).observe({"0": 1.0, "1": 8.0})
    assert steps_until_due(watch, PLANNED) > 100


def test_a_drift_that_changes_nothing_is_asked_about_ever_more_seldom() -> None:
    watch = Watch(PLANNED)
    while not watch.due:
        watch = watch.observe(THROTTLED)
    watch = watch.stays()
    assert steps_until_due(watch, THROTTLED) > 100  # that is normal now
    worse = {"0": 1.0, "1": 9.0}
    first = steps_until_due(watch, worse)
    assert first >= FIRST_PAUSE_STEPS
    assert steps_until_due(replace(watch, drift=Watch(PLANNED).drift).stays(), worse) > first


def test_a_move_must_gain_enough_for_the_steps_that_are_left() -> None:
    assert worth_moving(1.0, 0.5, steps_left=100, standstill_seconds=10.0)
    assert not worth_moving(1.0, 0.5, steps_left=15, standstill_seconds=10.0)
    assert not worth_moving(1.0, 0.95, steps_left=10_000, standstill_seconds=10.0)


def test_a_move_takes_as_long_as_the_device_that_fetches_most() -> None:
    work, devices = workload(), [device("a", mbps=8.0), device("b", mbps=8.0)]
    found = standstill_seconds(work, devices, {devices[0].id: (1, 1), devices[1].id: (1, 3)})
    # weight and two moments in float32
    assert found == pytest.approx(STANDSTILL_SECONDS + 2 * 12 * work.block_parameters / 1e6)


PARTS = st.builds(
    lambda first, count, embedding, head: stage_parts(
        first, min(first + count, LAYERS), embedding=embedding, head=head
    ),
    st.integers(0, LAYERS), st.integers(0, LAYERS), st.booleans(), st.booleans(),
)  # fmt: skip


@given(old=PARTS, new=PARTS, tied=st.booleans())
def test_only_what_both_stages_have_is_kept(
    old: frozenset[int], new: frozenset[int], tied: bool
) -> None:
    kept = kept_parts(old, new, tied=tied)
    assert kept <= old & new
    assert {part for part in old & new if isinstance(part, int)} <= kept
    ends = {EMBEDDING, HEAD}
    if tied and old & ends != new & ends:
        assert not kept & ends
    else:
        assert kept == old & new


def planned(*layers: int, names: str) -> list[StagePlan]:
    """Stages with so many layers on devices with these names."""
    work = workload(layers=sum(layers))
    first, found = 0, []
    template = make_plan(work, [device("x")], device("x").id).stages[0]
    for index, (count, name) in enumerate(zip(layers, names, strict=True)):
        found.append(
            replace(
                template, device=device(name).id, name=name, first_layer=first,
                past_last_layer=first + count, embedding=index == 0,
                head=index == len(layers) - 1,
            )
        )  # fmt: skip
        first += count
    return found


LAYOUTS = st.sampled_from([
    planned(6, names="a"), planned(2, 4, names="ab"), planned(5, 1, names="ab"),
    planned(3, 3, names="ba"), planned(2, 2, 2, names="abc"), planned(1, 4, 1, names="cab"),
])  # fmt: skip


@given(old=LAYOUTS, new=LAYOUTS, tied=st.booleans())
def test_every_part_that_a_stage_lacks_is_handed_over_once(
    old: list[StagePlan], new: list[StagePlan], tied: bool
) -> None:
    handed = [
        part
        for command in exports(old, new, tied=tied).values()
        for part in (
            *command.layers,
            *([EMBEDDING] if command.embedding else []),
            *([HEAD] if command.head else []),
        )
    ]
    lacked = [part for stage in wanted(old, new, tied=tied) for part in stage.parts]
    assert sorted(map(str, handed)) == sorted(map(str, lacked))


def test_nothing_moves_when_nothing_changes() -> None:
    same = planned(2, 2, 2, names="abc")
    assert exports(same, same, tied=True) == {}
    assert all(not stage.parts for stage in wanted(same, same, tied=True))


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("", "ab", {}),
        ("ab", "ba", {0: 1, 1: 0}),
        ("abc", "cb", {0: 2, 1: 1}),
        ("aba", "aba", {0: 0, 1: 1, 2: 2}),  # a has both ends
        ("ab", "aba", {0: 0, 1: 1}),
        ("ba", "aba", {1: 0, 2: 1}),
        ("aba", "ba", {0: 1, 1: 2}),
        ("aba", "ab", {0: 0, 1: 1}),
    ],
)
def test_a_device_goes_on_with_the_end_that_it_had(
    old: str, new: str, wanted: dict[int, int]
) -> None:
    assert continued([DeviceId(d) for d in old], [DeviceId(d) for d in new]) == wanted
