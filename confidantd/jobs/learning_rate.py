"""Learning-rate schedules, equal to `transformers.get_scheduler` step by step."""

from __future__ import annotations

import math

WARMUP_FRACTION = 0.03


def default_warmup_steps(schedule: str, steps: int) -> int:
    """3 % of the steps, rounded up, where the rate also decays; none where it is constant."""
    return 0 if schedule == "constant" else math.ceil(WARMUP_FRACTION * steps)


def learning_rate(schedule: str, step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """The rate of a step counted from 0: linear warm-up from 0, then the schedule's decay."""
    if step < warmup_steps:
        return peak * (step / max(1, warmup_steps))
    decay_steps = max(1, steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * max(0.0, (steps - step) / decay_steps)
        case "cosine":
            progress = (step - warmup_steps) / decay_steps
            return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        case _:
            raise ValueError(f"no schedule {schedule}")
