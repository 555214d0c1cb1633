"""When a running job gets another plan: stages drift from what was planned for them; pure.

A stage that becomes slow holds up all. After each step its seconds are compared with the
planned ones, as `drift` does it for backends. When a drift lasts, the coordinator is asked
what it would plan now; the job moves if that gains enough for the steps that are left.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from confidantd.ids import DeviceId
from confidantd.planner.costs import ASSUMED_MBPS, PlanDevice
from confidantd.planner.drift import Drift
from confidantd.planner.simulate import LinkCost, StageCost, simulate
from confidantd.planner.workload import FLOAT_BYTES, Workload

HYSTERESIS = 0.08  # the least gain for which a job moves: two plans that tie would alternate
FIRST_PAUSE_STEPS = 10  # after a drift that changed nothing; twice as long each further time
MOST_PAUSE_STEPS = 640
STANDSTILL_SECONDS = 3.0  # a move without data: offers, new links, a worker that starts
STATE_FLOATS = {"full": 3, "lora": 1, None: 1}  # of a parameter that moves, with its moments


LINKS = "links"  # beside the stages: what the step takes over what it would with such stages
LEAST_LEFT_SECONDS = 2 * STANDSTILL_SECONDS  # of a job; with less to go it stays as it is


def with_links(
    planned: Mapping[str, float],
    stages: Sequence[StageCost],
    links: Sequence[LinkCost],
    microbatches: int,
    step_seconds: float,
    holders: Sequence[int],
) -> dict[str, float]:
    """Measured seconds of stages and, as `LINKS`, how many times as long the step took as it
    does with these stages over the planned links.
    """
    simulated = simulate(stages, links, microbatches, holders=holders).seconds
    seconds = [stage.forward + stage.backward for stage in stages]
    found = dict(zip((name for name in planned if name != LINKS), seconds, strict=True))
    return {**found, LINKS: step_seconds / max(simulated, 1e-9)}


@dataclass(frozen=True, slots=True)
class Watch:
    """What was planned for each stage (seconds of a microbatch) and for the links (1: the step
    takes what it would with such stages), and how that drifts.
    """

    planned: Mapping[str, float]
    drift: Drift = field(default_factory=Drift)
    pause: int = 0
    next_pause: int = FIRST_PAUSE_STEPS

    def observe(self, measured: Mapping[str, float]) -> Watch:
        """After a step."""
        drift = self.drift.observe(self.planned, measured)
        return Watch(self.planned, drift, max(0, self.pause - 1), self.next_pause)

    @property
    def due(self) -> bool:
        """Whether it is time to ask for another plan."""
        return self.drift.lasting and self.pause == 0

    @property
    def farthest(self) -> str:
        """The stage that is farthest from its plan, or `LINKS`, beside the others."""
        ratios = self.drift.ratios
        middle = statistics.median(ratios.values())
        return max(ratios, key=lambda name: abs(math.log(ratios[name] / middle)))

    def stays(self) -> Watch:
        """The plan of now is still the best: the drift is what is normal from here on."""
        planned = {
            name: seconds * self.drift.ratios.get(name, 1.0)
            for name, seconds in self.planned.items()
        }
        following = min(2 * self.next_pause, MOST_PAUSE_STEPS)
        return Watch(planned, Drift(), self.next_pause, following)


def continued(old: Sequence[DeviceId], new: Sequence[DeviceId]) -> dict[int, int]:
    """Which new stage goes on from which old one, by the devices of the stages in order.

    A device that holds two, the ends of a pipeline, goes on with each as that end.
    """
    found: dict[int, int] = {}
    for device in dict.fromkeys(new):
        before = [place for place, d in enumerate(old) if d == device]
        after = [place for place, d in enumerate(new) if d == device]
        if len(before) == len(after):
            found |= dict(zip(after, before, strict=True))
        elif before:
            first = before[0] == 0 if len(after) > 1 else after[0] == 0
            found[after[0] if first else after[-1]] = before[0] if first else before[-1]
    return found


def worth_moving(
    kept_seconds: float, new_seconds: float, steps_left: int, standstill_seconds: float
) -> bool:
    """Whether a new plan (seconds of a step) pays for its standstill in what is left."""
    gain = kept_seconds - new_seconds
    return gain > HYSTERESIS * kept_seconds and gain * steps_left > standstill_seconds


def standstill_seconds(
    work: Workload, devices: Sequence[PlanDevice], layers: Mapping[DeviceId, tuple[int, int]]
) -> float:
    """What a move takes: each device fetches what it lacks, all at the same time.

    `layers`: how many a device has of its new stage, and how many that stage has.
    """
    a_layer = FLOAT_BYTES * work.block_parameters * STATE_FLOATS[work.method]
    found = 0.0
    for device in devices:
        has, gets = layers.get(device.id, (0, 0))
        mbps = device.bandwidth_mbps or ASSUMED_MBPS
        found = max(found, 8 * a_layer * (gets - has) / (mbps * 1e6))
    return STANDSTILL_SECONDS + found
