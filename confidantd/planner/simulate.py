"""An event simulation of one training step: schedule, devices and links; pure.

Every stage does its actions in order, as the runner does: receives wait, sends do not. A
transfer takes the sender's uplink and the receiver's downlink for as long as the slower of
the two needs, one after the other in the order of sending, and arrives a latency later. So
a device that talks to two neighbours shares its radio between them. The optimizer's steps
begin together, after all backwards and a round of the pipeline for the gradients' global norm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from confidantd.schedule.one_f_one_b import Action, ActionKind, actions

Schedule = Callable[[int, int, int], tuple[Action, ...]]


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of one microbatch on a stage, and of what follows the last one (optimizer).

    `messages` is the part of a forward, and of a backward, that its messages to and from other
    stages take.
    """

    forward: float
    backward: float
    update: float = 0.0
    messages: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Between two neighbours in a pipeline: seconds a transfer occupies it, and its latency."""

    seconds: float = 0.0
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """What a stage does from `start` to `end` (seconds since the step began)."""

    stage: int
    kind: ActionKind
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """One step: its seconds, and everything that was computed in it, by stage and time."""

    seconds: float
    spans: tuple[Span, ...]


_ARRIVES_AS = {
    ActionKind.SEND_ACTIVATION: (1, ActionKind.RECV_ACTIVATION),
    ActionKind.SEND_GRADIENT: (-1, ActionKind.RECV_GRADIENT),
}
_RECEIVES = {receive for _, receive in _ARRIVES_AS.values()}
_Frame = tuple[int, ActionKind, int]  # receiving stage, action, microbatch


def holders_of(devices: Sequence[str]) -> tuple[int, ...]:
    """For each stage, by the ids of the devices in order, the first stage on its device."""
    return tuple(devices.index(device) for device in devices)


class DeadlockError(ValueError):
    """Stages wait for each other for ever: the schedule is wrong."""


def simulate(
    stages: Sequence[StageCost],
    links: Sequence[LinkCost],
    microbatches: int,
    schedule: Schedule = actions,
    holders: Sequence[int] = (),
) -> Simulation:
    """One step of `stages`, with `links[i]` between stage i and i + 1.

    `holders`: the device of each stage, where one holds several, which then share its
    processor and its radio. DeadlockError if the schedule never ends.
    """
    if len(links) != len(stages) - 1:
        raise ValueError(f"{len(stages)} stages have {len(stages) - 1} links, not {len(links)}")
    schedules = [schedule(i, len(stages), microbatches) for i in range(len(stages))]
    run = _Run(stages, links, schedules, holders or range(len(stages)))
    return run.to_the_end()


class _Run:
    """The state of a simulation. Time of a stage only moves on; the earliest one acts first, so
    that transfers are queued in the order in which they are sent.
    """

    def __init__(
        self,
        stages: Sequence[StageCost],
        links: Sequence[LinkCost],
        schedules: Sequence[tuple[Action, ...]],
        holders: Sequence[int],
    ) -> None:
        self._holders = holders
        self._free = dict.fromkeys(holders, 0.0)  # when each device's processor is
        self._stages, self._links = stages, links
        self._left = [deque(schedule) for schedule in schedules]
        self._now = [0.0] * len(stages)
        self._uplink_free = dict.fromkeys(holders, 0.0)
        self._downlink_free = dict.fromkeys(holders, 0.0)
        self._arrived: dict[_Frame, float] = {}
        self._spans: list[Span] = []

    def to_the_end(self) -> Simulation:
        """Run until nothing is left to do."""
        while any(self._left):
            ready = list(self._ready())
            if not ready and not self._agree():
                waiting = [i for i, left in enumerate(self._left) if left]
                raise DeadlockError(f"stages {waiting} wait for each other")
            if ready:
                begins, stage = min(ready)
                self._now[stage] = begins
                self._act(stage, self._left[stage].popleft())
        last = max(self._now, default=0.0)
        return Simulation(last, tuple(sorted(self._spans, key=lambda s: (s.stage, s.start))))

    def _ready(self) -> Iterator[tuple[float, int]]:
        """Stages whose next action can begin, and when."""
        for stage, left in enumerate(self._left):
            if not left or left[0].kind is ActionKind.STEP:
                continue
            action = left[0]
            if action.kind in _ARRIVES_AS:
                yield self._now[stage], stage
            elif action.kind not in _RECEIVES:
                yield max(self._now[stage], self._free[self._holders[stage]]), stage
            elif (stage, action.kind, action.microbatch) in self._arrived:
                there = self._arrived[stage, action.kind, action.microbatch]
                yield max(self._now[stage], there), stage

    def _agree(self) -> bool:
        """All stages have nothing left but the optimizer: they know the norm of all gradients."""
        if any(not left or left[0].kind is not ActionKind.STEP for left in self._left):
            return False
        begins = max(self._now) + 2 * sum(link.latency for link in self._links)
        for stage, left in enumerate(self._left):
            self._now[stage] = begins
            self._compute(stage, left.popleft())
        return True

    def _act(self, stage: int, action: Action) -> None:
        if action.kind in _ARRIVES_AS:
            self._send(stage, action)
        elif action.kind not in _RECEIVES:
            self._compute(stage, action)

    def _compute(self, stage: int, action: Action) -> None:
        cost = self._stages[stage]
        seconds = {
            ActionKind.FORWARD: cost.forward,
            ActionKind.BACKWARD: cost.backward,
            ActionKind.STEP: cost.update,
        }[action.kind]
        start = max(self._now[stage], self._free[self._holders[stage]])
        self._now[stage] = self._free[self._holders[stage]] = start + seconds
        self._spans.append(Span(stage, action.kind, action.microbatch, start, start + seconds))

    def _send(self, stage: int, action: Action) -> None:
        """Queue a transfer; the sender goes on at once."""
        step, receive = _ARRIVES_AS[action.kind]
        target = stage + step
        link = self._links[min(stage, target)]
        sender, receiver = self._holders[stage], self._holders[target]
        begins = max(self._now[stage], self._uplink_free[sender], self._downlink_free[receiver])
        ends = begins + link.seconds
        self._uplink_free[sender] = self._downlink_free[receiver] = ends
        self._arrived[target, receive, action.microbatch] = ends + link.latency
