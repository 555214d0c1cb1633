"""Rotary positions as numbers."""

from __future__ import annotations

import math

from confidantd.models.spec import RopeSpec


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[float, ...]:
    """Inverse frequencies [d / 2]; what computes with float32 rounds them to the nearest.

    `llama3` stretches long wavelengths by `factor`, keeps short ones, and blends
    linearly in between (Llama 3.1's model card code).
    """
    return tuple(_scaled(rope.theta ** -(i / head_dim), rope) for i in range(0, head_dim, 2))


def _scaled(frequency: float, rope: RopeSpec) -> float:
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    blend = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency
