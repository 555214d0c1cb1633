"""What the event simulation says of partitions. The search has a closed form, which is fast and
nearly always right about their order; where plans are close, the simulation decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from confidantd.ids import DeviceId
from confidantd.planner.costs import link_cost, stage_cost
from confidantd.planner.partition import (
    MUCH_SLOWER,
    Partition,
    cost,
    predicted_seconds,
    text_factor,
)
from confidantd.planner.simulate import simulate
from confidantd.planner.workload import Workload


def simulated_seconds(work: Workload, found: Partition) -> float:
    """Of a step; or of a round of tokens, which the closed form has exactly."""
    if work.method is None:
        return predicted_seconds(work, found.devices, found.layers)
    last = len(found.devices) - 1
    stages = [
        stage_cost(work, device, layers, head=index == last, embedding=index == 0, form=form)
        for index, (device, layers, form) in enumerate(
            zip(found.devices, found.layers, found.forms, strict=True)
        )
    ]
    links = [link_cost(work, a, b) for a, b in itertools.pairwise(found.devices)]
    return simulate(stages, links, work.microbatches, holders=found.holders).seconds


def simulated_cost(work: Workload, found: Partition, owner: DeviceId) -> float:
    """Those seconds, a little more where the owner's token ids would leave its device."""
    return simulated_seconds(work, found) * text_factor(found.devices[0], owner)


def best_simulated(
    work: Workload, best: Partition, rivals: Sequence[Partition], owner: DeviceId
) -> tuple[Partition, list[Partition]]:
    """The best of a partition and its rivals that are nearly as fast in closed form; and the
    others, the fastest first.
    """
    limit = MUCH_SLOWER * cost(best, owner)
    near = [best, *(rival for rival in rivals if cost(rival, owner) <= limit)]
    found = min(near, key=lambda one: simulated_cost(work, one, owner))
    others = [one for one in (best, *rivals) if one is not found]
    return found, sorted(others, key=lambda one: simulated_cost(work, one, owner))
