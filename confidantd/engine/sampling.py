"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.tensors import Floats
from confidantd.errors import ProtocolError, WorkerError
from confidantd.wire.sampling import Sampling

Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
MOST_CHOSEN = 1 << 40


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, the logarithm of its probability in the model's own distribution, and the likeliest
    others with theirs, as many as were asked for.
    """

    token: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks tokens by `sampling`; the same seed gives the same tokens.

    `seen` are the tokens of the prompt and those that were chosen since, which a repetition
    penalty is about; after `chosen` tokens of an earlier sampler it goes on as that one did.
    """

    def __init__(self, sampling: Sampling, seen: Sequence[int] = (), chosen: int = 0) -> None:
        sampling.check()
        self._sampling = sampling
        self._seen = set(seen)
        if not 0 <= chosen <= MOST_CHOSEN:
            raise ProtocolError(f"{chosen} tokens cannot have been chosen before")
        bits = np.random.PCG64(sampling.seed & (2**64 - 1))
        bits.advance(chosen)  # each draw takes one number
        self._generator = np.random.Generator(bits)

    def pick(self, logits: Floats) -> Choice:
        """A token id from logits [V]; greedy takes the first of equals."""
        sampling = self._sampling
        if not np.isfinite(logits.max()):
            raise WorkerError("the model gives no numbers for the next token", "is it damaged?")
        penalised = self._penalised(logits)
        if sampling.temperature == 0:
            token = int(np.argmax(penalised))
        else:
            ids, probabilities = candidates(penalised, sampling)
            draw = self._generator.random() * probabilities.sum()
            place = int(np.searchsorted(np.cumsum(probabilities), draw, side="right"))
            token = int(ids[min(place, len(ids) - 1)])
        if sampling.repetition_penalty != 1:
            self._seen.add(token)
        return Choice(token, *_told(logits, token, sampling.logprobs))

    def _penalised(self, logits: Floats) -> Floats:
        """Logits of seen tokens divided by the penalty, or multiplied if they are negative
        (Keskar et al., CTRL, 2019, as `transformers` computes it).
        """
        penalty = self._sampling.repetition_penalty
        if penalty == 1 or not self._seen:
            return logits
        ids = np.fromiter((token for token in self._seen if token < len(logits)), np.int64)
        found, before = logits.copy(), logits[ids]
        found[ids] = np.where(before > 0, before / penalty, before * penalty)
        return found


def candidates(logits: Floats, sampling: Sampling) -> tuple[Ids, Doubles]:
    """The tokens that may be drawn, and their probabilities, which need not add up to 1.

    `top_k` keeps so many of the likeliest, `top_p` of these the fewest whose probabilities add up
    to it, `min_p` of these those at least so likely as the likeliest times it.
    """
    ids: Ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = np.argsort(-logits, kind="stable")[: sampling.top_k]  # of equals the first
    chosen = logits[ids].astype(np.float64)
    probabilities: Doubles = np.exp((chosen - chosen.max()) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1
        ids, probabilities = ids[order[:kept]], probabilities[order[:kept]]
    if sampling.min_p > 0:
        likely = probabilities >= sampling.min_p * probabilities.max()
        ids, probabilities = ids[likely], probabilities[likely]
    return ids, probabilities


def _told(logits: Floats, token: int, count: int | None) -> tuple[Any, ...]:
    """What is told of a choice besides the token."""
    if count is None:
        return ()
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    count = min(count, len(logits))
    best = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, np.int64)
    ordered = best[np.argsort(-logprobs[best], kind="stable")]
    return float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in ordered)
