"""A job that fits nowhere: what each device is short of, and the smallest changes that would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from confidantd.errors import DoesNotFitError
from confidantd.ids import DeviceId
from confidantd.planner.costs import PlanDevice
from confidantd.planner.memory import stage_memory
from confidantd.planner.partition import best_partition, rough_partition
from confidantd.planner.workload import Workload

MEGABYTE = 1_000_000
LORA_GUESS = 64  # adapter weights per unit of width: rank 8 on four square projections
LEAST_LENGTH = 16  # tokens: nobody trains on shorter texts
EXTRA_BYTES = 1 << 26  # an additional device is looked for in such steps
MOST_BYTES = 1 << 40
FEW_DEVICES, LISTED = 4, 8


def does_not_fit(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> DoesNotFitError:
    """Each device's memory against an equal share of the model, and what would help."""
    count = min(len(devices), work.layers)
    share = -(-work.layers // count)
    shortfalls = []
    for index, device in enumerate(devices):
        stage = min(index, count - 1)
        need = stage_memory(
            work, share, embedding=stage == 0, head=stage == count - 1, stage=stage, stages=count
        ).total
        short = need - device.available_bytes
        state = f"is {short / MEGABYTE:.0f} MB short of" if short > 0 else "has"
        shortfalls.append(f"{device.name} {state} the {need / MEGABYTE:.0f} MB for its share")
    verb = "training" if work.method else "running"
    changes = list(what_would_fit(work, devices, owner, use_all=use_all))
    hint = "it fits with " + ", or ".join(changes) if changes else "free memory on these devices"
    if len(shortfalls) > LISTED:
        shortfalls = [*shortfalls[:LISTED], f"and {len(shortfalls) - LISTED} more"]
    return DoesNotFitError(f"{verb} {work.model} does not fit: {'; '.join(shortfalls)}", hint)


def what_would_fit(
    work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool
) -> Iterator[str]:
    """The smallest change of each kind that fits. Computing again is no choice: it was tried."""

    def fits(changed: Workload, *, every: bool) -> bool:
        return _fits(changed, devices, owner, use_all=every)

    if use_all and len(devices) > 1 and fits(work, every=False):
        yield "fewer --devices"
    if work.method is not None:
        for option, changed in _smaller(work):
            if fits(changed, every=use_all):
                yield option
                break
    lora = replace(work, method="lora", block_adapter=LORA_GUESS * work.hidden)
    if work.method == "full" and fits(lora, every=use_all):
        yield "--method lora"
    extra = _extra_bytes(work, devices, owner)
    if extra is not None:
        yield f"one more device with {extra / MEGABYTE:.0f} MB for jobs"


def _fits(work: Workload, devices: Sequence[PlanDevice], owner: DeviceId, *, use_all: bool) -> bool:
    """Exact for few devices; over many a change that would do may be missed, which takes too
    long to be sure of.
    """
    search = best_partition if len(devices) <= FEW_DEVICES else rough_partition
    return search(work, devices, owner, use_all=use_all) is not None


def _smaller(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Steps that take less memory: the batch in more pieces, then shorter sequences, too."""
    batch = work.microbatch_size * work.microbatches
    for rows in range(work.microbatch_size - 1, 0, -1):
        if batch % rows == 0:
            yield f"--microbatches {batch // rows}", _resized(work, rows, work.sequence_length)
    length = work.sequence_length // 2
    while length >= LEAST_LENGTH:
        option = f"--sequence-length {length}"
        if work.microbatch_size > 1:
            option += f" --microbatches {batch}"
        yield option, _resized(work, 1, length)
        length //= 2


def _resized(work: Workload, rows: int, length: int) -> Workload:
    """With other microbatches of the same batch; what grows with the square of a length is
    taken to shrink with it only.
    """
    batch = work.microbatch_size * work.microbatches
    saved = work.saved_floats * rows * length // (work.microbatch_size * work.sequence_length)
    return replace(
        work, microbatch_size=rows, microbatches=batch // rows, sequence_length=length,
        saved_floats=saved,
    )  # fmt: skip


def _extra_bytes(work: Workload, devices: Sequence[PlanDevice], owner: DeviceId) -> int | None:
    """The least memory of one more device with which all would fit; None if none is enough."""
    if len(devices) >= work.layers:
        return None
    model = replace(devices[0], id=DeviceId("one more"), name="one more")

    def enough(size: int) -> bool:
        some = [*devices, replace(model, available_bytes=size)]
        # in front it may have nearly all, or all: it is the only one that need not be small
        return any(_fits(work, some, first, use_all=False) for first in (model.id, owner))

    low, high = 0, MOST_BYTES // EXTRA_BYTES
    if not enough(high * EXTRA_BYTES):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle * EXTRA_BYTES) else (middle, high)
    return high * EXTRA_BYTES
