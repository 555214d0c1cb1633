"""Choosing the next token from logits."""

from __future__ import annotations

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.errors import UsageError


class Sampler:
    """Temperature and nucleus sampling; the same seed gives the same tokens.

    `temperature` 0 is greedy. `top_p` keeps the fewest most likely tokens whose
    probabilities add up to it. After `chosen` tokens of an earlier one it goes on as that did.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, chosen: int = 0) -> None:
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"the temperature must be 0 or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise UsageError(f"top-p must be over 0 and at most 1, not {top_p}")
        self._temperature = temperature
        self._top_p = top_p
        self._generator = np.random.default_rng(seed & (2**64 - 1))
        self._generator.random(chosen)

    def pick(self, logits: Floats) -> int:
        """A token id from logits [V]; greedy takes the first of equals."""
        if self._temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._temperature
        probabilities = np.exp(scaled - scaled.max())
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order] / probabilities.sum())
        kept = int(np.searchsorted(cumulative, self._top_p)) + 1
        draw = self._generator.random() * cumulative[min(kept, len(order)) - 1]
        place = int(np.searchsorted(cumulative, draw, side="right"))
        return int(order[min(place, kept - 1, len(order) - 1)])
