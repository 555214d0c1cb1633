"""AdamW in numpy, in place, with the arithmetic of `torch.optim.AdamW` (single tensor form)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.wire.stage import OptimizerSpec

CHUNK_ELEMENTS = 1 << 14  # temporaries of 64 KiB: in every cache
# Threads take turns at Python's lock between two operations: with 64 KiB two of them are
# slower than one, with 512 KiB 1.65 times as fast.
SHARED_CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step, numbered from 1; gradients are multiplied by `clip_coefficient`."""

    number: int
    learning_rate: float
    clip_coefficient: float


class Moments:
    """Both running averages of one weight's gradient; zero at first."""

    def __init__(self, weight: Floats) -> None:
        self.first = np.zeros(weight.size, np.float32)
        self.second = np.zeros(weight.size, np.float32)

    @property
    def bytes(self) -> int:
        """Memory of both."""
        return self.first.nbytes + self.second.nbytes


def update(
    weight: Floats,
    gradient: Floats,
    moments: Moments,
    optimizer: OptimizerSpec,
    step: Step,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> None:
    """Change a weight and its moments in place; all arrays in C order."""
    flat_weight, flat_gradient = weight.reshape(-1), gradient.reshape(-1)
    correction1 = 1 - optimizer.beta1**step.number
    correction2_root = np.float32((1 - optimizer.beta2**step.number) ** 0.5)
    step_size = np.float32(step.learning_rate / correction1)
    decay = np.float32(1 - step.learning_rate * optimizer.weight_decay)
    scratch = np.empty((2, min(chunk_elements, flat_weight.size)), np.float32)
    for start in range(0, flat_weight.size, chunk_elements):
        part = slice(start, start + chunk_elements)
        w, m, v = flat_weight[part], moments.first[part], moments.second[part]
        g, t = scratch[0, : w.size], scratch[1, : w.size]
        np.multiply(flat_gradient[part], np.float32(step.clip_coefficient), out=g)
        w *= decay
        np.subtract(g, m, out=t)
        t *= np.float32(1 - optimizer.beta1)
        m += t
        v *= np.float32(optimizer.beta2)
        np.multiply(g, g, out=t)
        t *= np.float32(1 - optimizer.beta2)
        v += t
        np.sqrt(v, out=t)
        t /= correction2_root
        t += np.float32(optimizer.epsilon)
        np.divide(m, t, out=t)
        t *= step_size
        w -= t


def square_sum(gradient: Floats) -> float:
    """Sum of squares, accumulated in float64."""
    flat = gradient.reshape(-1)
    total, wide = 0.0, np.empty(min(CHUNK_ELEMENTS, flat.size), np.float64)
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        narrow = flat[start : start + CHUNK_ELEMENTS]
        part = wide[: narrow.size]
        part[...] = narrow
        total += float(part @ part)
    return total
