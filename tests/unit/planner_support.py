"""Workloads and devices for tests of the planner, with numbers that are easy to follow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from confidantd.ids import DeviceId, digest_of
from confidantd.planner.costs import PlanDevice
from confidantd.planner.memory import stage_memory
from confidantd.planner.microbatches import Cut
from confidantd.planner.options import FORMS
from confidantd.planner.partition import Partition, predicted_seconds
from confidantd.planner.plan import Plan, choose_plan
from confidantd.planner.workload import Method, Workload
from confidantd.wire.jobs import OwnerEnds

GIGABYTE = 1_000_000_000


def workload(
    *,
    layers: int = 6,
    method: Method | None = "full",
    microbatch_size: int = 2,
    microbatches: int = 4,
    sequence_length: int = 128,
    tied: bool = False,
    saved_rows: int = 0,
    load: int = 0,
    vocabulary: int = 32_000,
) -> Workload:
    """A Llama of 768 wide, 12 heads, MLP 2048, vocabulary 32,000.

    In the saved form a block keeps `saved_rows` times as much as its input. `load` is of
    generation only.
    """
    hidden, columns = 768, 2048
    return Workload(
        model="m",
        layers=layers,
        block_parameters=4 * hidden * hidden + 3 * hidden * columns + 2 * hidden,
        block_adapter=64 * hidden if method == "lora" else 0,
        embedding_parameters=vocabulary * hidden,
        head_parameters=vocabulary * hidden + hidden,
        tied=tied,
        hidden=hidden,
        vocabulary=vocabulary,
        heads=12,
        head_dim=64,
        kv_width=768,
        columns=columns,
        microbatch_size=microbatch_size,
        microbatches=microbatches,
        sequence_length=sequence_length,
        method=method,
        saved_floats=saved_rows * microbatch_size * sequence_length * hidden,
        load=0 if method else load,
    )


def device(
    name: str,
    gflops: float = 50.0,
    available_bytes: int = 100 * GIGABYTE,
    mbps: float | None = 10_000.0,
) -> PlanDevice:
    """A device with an id that follows from its name."""
    identity = DeviceId(digest_of(name.encode()))
    return PlanDevice(identity, name, available_bytes, gflops, mbps, 0.001)


DEVICE_FIGURES = st.tuples(
    st.floats(1, 200), st.integers(100_000_000, 3 * GIGABYTE), st.sampled_from([None, 20.0, 900.0])
)
SWARMS = st.lists(DEVICE_FIGURES, min_size=1, max_size=4).map(
    lambda figures: [device(f"d{i}", *figure) for i, figure in enumerate(figures)]
)


def fits(work: Workload, found: Partition) -> bool:
    """Whether every stage stays within its device's memory."""
    last = len(found.devices) - 1
    return all(
        stage_memory(
            work, layers, embedding=i == 0, head=i == last, stage=i, stages=last + 1, form=form
        ).total
        <= holder.available_bytes
        for i, (holder, layers, form) in enumerate(
            zip(found.devices, found.layers, found.forms, strict=True)
        )
    )


def everything(
    work: Workload, devices: Sequence[PlanDevice], *, use_all: bool
) -> Iterator[Partition]:
    """Every partition that fits, in all forms."""
    for size in [len(devices)] if use_all else range(1, len(devices) + 1):
        for order in itertools.permutations(devices, size):
            for ends in itertools.combinations(range(1, work.layers), size - 1):
                layers = tuple(b - a for a, b in itertools.pairwise((0, *ends, work.layers)))
                for forms in itertools.product(FORMS, repeat=size):
                    seconds = predicted_seconds(work, order, layers, forms)
                    found = Partition(order, layers, forms, seconds)
                    if fits(work, found):
                        yield found


def make_plan(
    work: Workload,
    devices: Sequence[PlanDevice],
    owner: DeviceId,
    *,
    use_all: bool = False,
    layers: tuple[int, ...] = (),
    ends: OwnerEnds = "never",
    explain: bool = False,
) -> Plan:
    """The plan for one way to cut the batch, as `choose_plan` makes it."""
    cuts = (Cut(work, tuple(devices)),)
    return choose_plan(cuts, owner, use_all=use_all, layers=layers, ends=ends, explained=explain)
