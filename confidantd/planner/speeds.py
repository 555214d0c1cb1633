"""How measured speeds are read, and how running steps correct them; pure."""

from __future__ import annotations

from dataclasses import fields, replace

from confidantd.planner.workload import FLOAT_BYTES, Form
from confidantd.wire.speeds import Speeds

LEAST_WEIGHT = 0.3  # of the newest step: one is noisy, a hot phone stays hot
LIKELY = 100.0  # a step that differs by more than this factor is a clock that jumped
MOST_SECONDS = 1e6
CACHE_BYTES = 16_000_000  # more than the last level's part of one core, on most
READ_BYTES = 64_000_000  # twice the largest last level that a worker may have for itself
_SECONDS = tuple(field.name for field in fields(Speeds) if field.name != "head")


def measured_blocks(layers: int, block_parameters: int) -> int:
    """How many blocks of a model with so many layers are measured in training, one after the
    other: so many that their weights leave the processor's cache, as those of a stage do.
    """
    return max(1, min(layers, CACHE_BYTES // (FLOAT_BYTES * block_parameters)))


def measured_decode_blocks(layers: int, block_bytes: int) -> int:
    """How many of them in generation, where a token takes as long as it takes to read them: far
    more than any cache holds.
    """
    return max(1, min(layers, -(-READ_BYTES // block_bytes)))


def block_seconds(speeds: Speeds, form: Form) -> tuple[float, float]:
    """Forward and backward of one block; computing again is never taken to be faster."""
    saved = speeds.forward + speeds.backward
    if form == "saved":
        return speeds.forward, speeds.backward
    forward = min(speeds.forward_again, saved)
    return forward, max(speeds.backward_again, saved - forward)


def with_block(speeds: Speeds, seconds: float, form: Form) -> Speeds:
    """With blocks that take `seconds` for both passes, as several backends together do."""
    before = sum(block_seconds(speeds, form))
    ratio = seconds / before if before > 0 else 1.0
    if form == "saved":
        return replace(speeds, forward=speeds.forward * ratio, backward=speeds.backward * ratio)
    return replace(
        speeds,
        forward_again=speeds.forward_again * ratio,
        backward_again=speeds.backward_again * ratio,
    )


def scaled(speeds: Speeds, ratio: float) -> Speeds:
    """Everything that many times as slow."""
    head = None if speeds.head is None else speeds.head * ratio
    return Speeds(head=head, **{name: getattr(speeds, name) * ratio for name in _SECONDS})


def resized(speeds: Speeds, measured_at: Speeds, wanted_at: Speeds) -> Speeds:
    """Speeds for microbatches of another size, where a device measured none of that size.

    They change as those do that any device is assumed to have: `measured_at` the one size and
    `wanted_at` the other.
    """
    found = {}
    for name in _SECONDS:
        before, after = getattr(measured_at, name), getattr(wanted_at, name)
        found[name] = getattr(speeds, name) * (after / before if before > 0 else 1.0)
    head = speeds.head
    if head is not None and measured_at.head and wanted_at.head:
        head *= wanted_at.head / measured_at.head
    return Speeds(head=head, **found)


def corrected(
    speeds: Speeds, predicted: float, measured: float, steps: int, busy: float = 1.0
) -> Speeds:
    """After a step in which a stage took `measured` seconds instead of `predicted` by these.

    What slows a stage (heat, another program) slows all of it. `steps` came before: the
    first one counts more than the few runs of a block that were measured, the first few
    count alike, and later ones displace the older ones. `busy` is the share of the step in
    which the stage computed: one that rests in between shows how fast a rested device is.
    """
    if predicted <= 0 or not 1 / LIKELY < measured / predicted < LIKELY:
        return speeds
    weight = busy * max(LEAST_WEIGHT, 1 / (steps + 1))
    return scaled(speeds, 1 + weight * (measured / predicted - 1))


def valid(found: Speeds) -> bool:
    """Whether all numbers can be seconds: what a peer says may be anything."""
    numbers = [getattr(found, name) for name in _SECONDS] + [found.head or 0.0]
    return found.forward > 0 and all(0 <= n < MOST_SECONDS for n in numbers)
