"""What devices and links take for the parts of a plan, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.planner.simulate import LinkCost, StageCost
from confidantd.planner.workload import PASSES, Form, Workload, stage_flops

ASSUMED_GFLOPS = 5.0  # of a device that has not been measured: a slow phone
ASSUMED_MBPS = 50.0  # of a link that has not been measured: ordinary Wi-Fi
ASSUMED_ROUND_TRIP_SECONDS = 0.005
GENERATION_EFFICIENCY = 0.05  # products with one row are bound by memory, not arithmetic


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """A device as the planner sees it; `gflops` 0 and None are unmeasured."""

    id: DeviceId
    name: str
    available_bytes: int
    gflops: float
    bandwidth_mbps: float | None = None
    round_trip_seconds: float | None = None
    backends: tuple[str, ...] = ("cpu",)


def stage_seconds(
    work: Workload, device: PlanDevice, layers: int, *, head: bool, form: Form = "saved"
) -> float:
    """Seconds of one microbatch (training) or one token (generation) on a device."""
    gflops = device.gflops or ASSUMED_GFLOPS
    if work.method is None:
        gflops *= GENERATION_EFFICIENCY
    return stage_flops(work, layers, head=head, form=form) / (gflops * 1e9)


def stage_cost(
    work: Workload, device: PlanDevice, layers: int, *, head: bool, form: Form = "saved"
) -> StageCost:
    """Seconds of forward and backward of one microbatch in training, and of the optimizer."""
    whole = stage_seconds(work, device, layers, head=head, form=form)
    saved = stage_seconds(work, device, layers, head=head)
    forward = saved / PASSES[work.method]
    return StageCost(forward, whole - forward)


def link_cost(work: Workload, first: PlanDevice, second: PlanDevice) -> LinkCost:
    """What one activation takes from one device to another, over the slower radio."""
    mbps = min(d.bandwidth_mbps or ASSUMED_MBPS for d in (first, second))
    trips = [d.round_trip_seconds for d in (first, second) if d.round_trip_seconds is not None]
    latency = max(trips, default=ASSUMED_ROUND_TRIP_SECONDS) / 2
    return LinkCost(8 * work.activation_bytes / (mbps * 1e6), latency)
