"""How tokens are chosen: what a person asks for, as the head stage is told it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from confidantd.errors import UsageError

MOST_LOGPROBS = 20  # of other tokens; as in OpenAI's API
MOST_PENALTY = 100.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep all tokens, and a
    `repetition_penalty` of 1 changes nothing. `logprobs`: so many of the likeliest tokens are
    told with each one; None: not even its own probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def check(self) -> None:
        """`UsageError` names what makes no sense."""
        checks = (
            (0 <= self.temperature < math.inf, "temperature must be 0 or more", self.temperature),
            (0 < self.top_p <= 1, "top-p must be over 0 and at most 1", self.top_p),
            (0 <= self.top_k < 1 << 31, "top-k must be 0 or more", self.top_k),
            (0 <= self.min_p <= 1, "min-p must be from 0 to 1", self.min_p),
            (
                0 < self.repetition_penalty <= MOST_PENALTY,
                f"repetition penalty must be over 0 and at most {MOST_PENALTY:.0f}",
                self.repetition_penalty,
            ),
            (-(1 << 63) <= self.seed < 1 << 64, "seed must have 64 bits at the most", self.seed),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs must be from 0 to {MOST_LOGPROBS}",
                self.logprobs,
            ),
        )
        for right, sentence, value in checks:
            if not right:
                raise UsageError(f"the {sentence}, not {value}")
