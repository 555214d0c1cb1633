"""1F1B schedules: run by a small simulator of blocking receives, for deadlock, order and memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.schedule.one_f_one_b import (
    Action,
    ActionKind,
    actions,
    forward_actions,
    in_flight,
)

MAX_STAGES, MAX_MICROBATCHES = 8, 32
SENDS = {
    ActionKind.SEND_ACTIVATION: (1, ActionKind.RECV_ACTIVATION),
    ActionKind.SEND_GRADIENT: (-1, ActionKind.RECV_GRADIENT),
}
RECEIVES = {receive for _, receive in SENDS.values()}


def run(schedules: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """What each stage gets done before all wait; sends never block, receives wait in order."""
    left = [deque(schedule) for schedule in schedules]
    done: list[list[Action]] = [[] for _ in schedules]
    arrived: dict[tuple[int, ActionKind], deque[int]] = {
        key: deque() for key in itertools.product(range(len(schedules)), RECEIVES)
    }
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(left):
            while queue and can_go(queue[0], arrived.get((stage, queue[0].kind))):
                action = queue.popleft()
                done[stage].append(action)
                moved = True
                if action.kind in SENDS:
                    step, receive = SENDS[action.kind]
                    arrived[stage + step, receive].append(action.microbatch)
    return done


def can_go(action: Action, waiting: deque[int] | None) -> bool:
    """Whether an action need not wait; takes the frame of a receive, which must be the next one."""
    if waiting is None:
        return True
    if not waiting:
        return False
    assert waiting.popleft() == action.microbatch  # a link delivers in order
    return True


def microbatches_of(schedule: Sequence[Action], kind: ActionKind) -> list[int]:
    return [action.microbatch for action in schedule if action.kind is kind]


def most_in_flight(schedule: Sequence[Action]) -> int:
    change = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1}
    return max(itertools.accumulate(change.get(action.kind, 0) for action in schedule))


SHAPES = list(itertools.product(range(1, MAX_STAGES + 1), range(1, MAX_MICROBATCHES + 1)))


@pytest.mark.parametrize("schedule", [actions, forward_actions])
def test_no_stage_waits_for_ever(schedule) -> None:
    for stages, microbatches in SHAPES:
        wanted = [schedule(stage, stages, microbatches) for stage in range(stages)]
        assert [tuple(found) for found in run(wanted)] == wanted, (stages, microbatches)


def test_every_microbatch_goes_forward_and_backward_once_and_in_order() -> None:
    for stages, microbatches in SHAPES:
        for stage in range(stages):
            found = actions(stage, stages, microbatches)
            expected = list(range(microbatches))
            assert microbatches_of(found, ActionKind.FORWARD) == expected
            assert microbatches_of(found, ActionKind.BACKWARD) == expected
            assert found[-1].kind is ActionKind.STEP
            assert len(microbatches_of(found, ActionKind.STEP)) == 1


def test_in_flight_is_reached_and_never_passed() -> None:
    for stages, microbatches in SHAPES:
        for stage in range(stages):
            found = most_in_flight(actions(stage, stages, microbatches))
            assert found == in_flight(stage, stages, microbatches)
            assert found <= min(stages - stage, microbatches)


@given(data=st.data())
def test_a_microbatch_moves_through_a_stage_in_order(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, MAX_STAGES))
    stage = data.draw(st.integers(0, stages - 1))
    microbatches = data.draw(st.integers(1, MAX_MICROBATCHES))
    microbatch = data.draw(st.integers(0, microbatches - 1))
    found = [
        action.kind
        for action in actions(stage, stages, microbatches)[:-1]
        if action.microbatch == microbatch
    ]
    first, last = stage == 0, stage == stages - 1
    expected = [] if first else [ActionKind.RECV_ACTIVATION]
    expected += [ActionKind.FORWARD]
    expected += [] if last else [ActionKind.SEND_ACTIVATION, ActionKind.RECV_GRADIENT]
    expected += [ActionKind.BACKWARD]
    expected += [] if first else [ActionKind.SEND_GRADIENT]
    assert found == expected


def test_the_middle_of_three_stages_with_four_microbatches() -> None:
    kinds = {ActionKind.FORWARD: "F", ActionKind.BACKWARD: "B", ActionKind.STEP: "S"}
    found = "".join(
        f"{kinds[action.kind]}{action.microbatch} "
        for action in actions(1, 3, 4)
        if action.kind in kinds
    )
    assert found == "F0 F1 B0 F2 B1 F3 B2 B3 S0 "


@pytest.mark.parametrize("shape", [(-1, 2, 1), (2, 2, 1), (0, 0, 1), (0, 1, 0)])
def test_a_stage_that_is_not_there_is_refused(shape: tuple[int, int, int]) -> None:
    for schedule in (actions, forward_actions):
        with pytest.raises(ValueError, match="no stage"):
            schedule(*shape)
