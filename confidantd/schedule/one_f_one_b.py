"""Synchronous 1F1B (PipeDream-flush): what each stage does in a step, as a list of actions.

Stage i of p runs p - i - 1 forwards ahead, then one forward and one backward in
turn, then the backwards that are left: at most min(p - i, m) microbatches are in
flight on it, and the bubble is (p - 1) / (m + p - 1) of the step
(Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, 2021).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class ActionKind(enum.Enum):
    """What one action does."""

    RECV_ACTIVATION = "recv-activation"
    FORWARD = "forward"
    SEND_ACTIVATION = "send-activation"
    RECV_GRADIENT = "recv-gradient"
    BACKWARD = "backward"
    SEND_GRADIENT = "send-gradient"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class Action:
    """One action on one microbatch (0 for `STEP`)."""

    kind: ActionKind
    microbatch: int = 0


def in_flight(stage: int, stages: int, microbatches: int) -> int:
    """Most microbatches whose forward is done and whose backward is not."""
    return min(stages - stage, microbatches)


def actions(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """One training step of a stage: every microbatch forward and backward, then `STEP`."""
    _check(stage, stages, microbatches)
    ahead = in_flight(stage, stages, microbatches) - 1
    found: list[Action] = []
    for microbatch in range(ahead):
        found += _forward(stage, stages, microbatch)
    for microbatch in range(microbatches):
        if microbatch + ahead < microbatches:
            found += _forward(stage, stages, microbatch + ahead)
        found += _backward(stage, stages, microbatch)
    return (*found, Action(ActionKind.STEP))


def forward_actions(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """Forward only, for evaluation."""
    _check(stage, stages, microbatches)
    return tuple(a for m in range(microbatches) for a in _forward(stage, stages, m))


def _forward(stage: int, stages: int, microbatch: int) -> Iterator[Action]:
    if stage > 0:
        yield Action(ActionKind.RECV_ACTIVATION, microbatch)
    yield Action(ActionKind.FORWARD, microbatch)
    if stage < stages - 1:
        yield Action(ActionKind.SEND_ACTIVATION, microbatch)


def _backward(stage: int, stages: int, microbatch: int) -> Iterator[Action]:
    if stage < stages - 1:
        yield Action(ActionKind.RECV_GRADIENT, microbatch)
    yield Action(ActionKind.BACKWARD, microbatch)
    if stage > 0:
        yield Action(ActionKind.SEND_GRADIENT, microbatch)


def _check(stage: int, stages: int, microbatches: int) -> None:
    if not 0 <= stage < stages or microbatches < 1:
        raise ValueError(f"no stage {stage} of {stages} with {microbatches} microbatches")
