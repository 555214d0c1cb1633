"""The simulator against closed forms, its bounds, and schedules that cannot end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.planner.simulate import DeadlockError, LinkCost, Simulation, StageCost, simulate
from confidantd.schedule.one_f_one_b import Action, ActionKind, actions

MAX_STAGES, MAX_MICROBATCHES = 8, 32
SECONDS = st.floats(0.001, 10)
STAGES = st.lists(st.builds(StageCost, SECONDS, SECONDS, st.floats(0, 1)), min_size=1, max_size=8)
LINKS = st.lists(st.builds(LinkCost, st.floats(0, 5), st.floats(0, 1)), min_size=7, max_size=7)
MICROBATCHES = st.integers(1, MAX_MICROBATCHES)


def busy_seconds(found: Simulation, stage: int) -> float:
    """How long a stage computed."""
    return sum(span.end - span.start for span in found.spans if span.stage == stage)


@pytest.mark.parametrize("stages", range(1, MAX_STAGES + 1))
@pytest.mark.parametrize("microbatches", range(1, MAX_MICROBATCHES + 1))
def test_equal_stages_have_the_bubble_of_the_formula(stages: int, microbatches: int) -> None:
    """(p - 1) / (m + p - 1) of the step, without links and optimizer."""
    found = simulate([StageCost(1.0, 2.0)] * stages, [LinkCost()] * (stages - 1), microbatches)
    assert found.seconds == pytest.approx((microbatches + stages - 1) * 3.0)
    for stage in range(stages):
        bubble = 1 - busy_seconds(found, stage) / found.seconds
        assert bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@given(stages=STAGES, links=LINKS, microbatches=MICROBATCHES)
def test_every_schedule_ends_within_its_bounds(
    stages: list[StageCost], links: list[LinkCost], microbatches: int
) -> None:
    """Not faster than the busiest stage or the way through; not slower than all in a row."""
    links = links[: len(stages) - 1]
    found = simulate(stages, links, microbatches)
    each = [microbatches * (s.forward + s.backward) + s.update for s in stages]
    there_and_back = sum(s.forward + s.backward for s in stages)
    there_and_back += sum(2 * (k.seconds + k.latency) for k in links)
    assert found.seconds >= max(each) * (1 - 1e-9)
    assert found.seconds >= there_and_back * (1 - 1e-9)
    in_a_row = sum(each) + microbatches * sum(2 * (k.seconds + k.latency) for k in links)
    in_a_row += sum(2 * k.latency for k in links)  # a round for the norm
    assert found.seconds <= in_a_row * (1 + 1e-9)
    assert len(found.spans) == len(stages) * (2 * microbatches + 1)
    for stage, cost in enumerate(each):
        assert busy_seconds(found, stage) == pytest.approx(cost)


@given(stages=STAGES, links=LINKS, microbatches=MICROBATCHES)
def test_the_optimizer_begins_after_all_backwards_and_a_round_for_the_norm(
    stages: list[StageCost], links: list[LinkCost], microbatches: int
) -> None:
    links = links[: len(stages) - 1]
    spans = simulate(stages, links, microbatches).spans
    backwards = max(s.end for s in spans if s.kind is ActionKind.BACKWARD)
    begins = [s.start for s in spans if s.kind is ActionKind.STEP]
    assert begins == pytest.approx([backwards + 2 * sum(k.latency for k in links)] * len(stages))


@given(stages=STAGES, links=LINKS, microbatches=MICROBATCHES)
def test_a_stage_does_one_thing_at_a_time(
    stages: list[StageCost], links: list[LinkCost], microbatches: int
) -> None:
    spans = simulate(stages, links[: len(stages) - 1], microbatches).spans
    for before, after in itertools.pairwise(spans):
        assert after.stage > before.stage or after.start >= before.end - 1e-9


@given(stages=STAGES, links=LINKS, microbatches=MICROBATCHES)
def test_a_backward_follows_that_of_the_next_stage(
    stages: list[StageCost], links: list[LinkCost], microbatches: int
) -> None:
    spans = simulate(stages, links[: len(stages) - 1], microbatches).spans
    at = {(s.stage, s.kind, s.microbatch): s for s in spans}
    for stage in range(len(stages) - 1):
        link = links[stage]
        way = link.seconds + link.latency
        for m in range(microbatches):
            forward = at[stage, ActionKind.FORWARD, m], at[stage + 1, ActionKind.FORWARD, m]
            backward = at[stage + 1, ActionKind.BACKWARD, m], at[stage, ActionKind.BACKWARD, m]
            for before, after in (forward, backward):
                assert after.start >= before.end + way - 1e-9


def test_both_ways_of_a_link_overlap() -> None:
    """An activation goes up while a gradient comes down: half of what a row would take."""
    found = simulate([StageCost(0.001, 0.001)] * 2, [LinkCost(3.0)], 20)
    assert 20 * 3.0 < found.seconds < 0.6 * 20 * 2 * 3.0


def test_a_device_between_two_neighbours_shares_its_radio() -> None:
    """The one in the middle sends 20 activations on and 20 gradients back, a second each."""
    ends = simulate([StageCost(0.1, 0.1)] * 2, [LinkCost(1.0)], 20)
    middle = simulate([StageCost(0.1, 0.1)] * 3, [LinkCost(1.0)] * 2, 20)
    assert ends.seconds < 40
    assert middle.seconds > 40


def test_latency_delays_and_does_not_occupy() -> None:
    quick = simulate([StageCost(1.0, 1.0)] * 2, [LinkCost(0.0, 0.5)], 30)
    assert quick.seconds < 31 * 2.0 + 30 * 2 * 0.5  # what it would take if it occupied


def test_a_schedule_that_waits_for_itself_is_found() -> None:
    def receives_first(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
        return (Action(ActionKind.RECV_GRADIENT), *actions(stage, stages, microbatches))

    with pytest.raises(DeadlockError, match="wait for each other"):
        simulate([StageCost(1, 1)] * 2, [LinkCost()], 2, receives_first)
    with pytest.raises(ValueError, match="2 stages have 1 links, not 0"):
        simulate([StageCost(1, 1)] * 2, [], 2)


@given(stages=STAGES, links=LINKS, microbatches=MICROBATCHES)
def test_stages_on_one_device_take_turns(
    stages: list[StageCost], links: list[LinkCost], microbatches: int
) -> None:
    links = links[: len(stages) - 1]
    ends = [i % max(1, len(stages) - 1) for i in range(len(stages))]  # the last where the first is
    found = simulate(stages, links, microbatches, holders=ends)
    first, last = stages[0], stages[-1]
    if len(stages) > 1:
        both = microbatches * (first.forward + first.backward + last.forward + last.backward)
        assert found.seconds >= (both + first.update + last.update) * (1 - 1e-9)
        spans = sorted((s.start, s.end) for s in found.spans if s.stage in (0, len(stages) - 1))
        assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(spans))
    each = [microbatches * (s.forward + s.backward) + s.update for s in stages]
    transfers = microbatches * sum(2 * (k.seconds + k.latency) for k in links)
    assert found.seconds <= (sum(each) + transfers + sum(2 * k.latency for k in links)) * (1 + 1e-9)
