"""Workloads and devices for tests of the planner, with numbers that are easy to follow."""

from __future__ import annotations

from confidantd.ids import DeviceId, digest_of
from confidantd.planner.costs import PlanDevice
from confidantd.planner.workload import Method, Workload

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
    vocabulary: int = 32_000,
) -> Workload:
    """A Llama of 768 wide, 12 heads, MLP 2048, vocabulary 32,000.

    In the saved form a block keeps `saved_rows` times as much as its input.
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
