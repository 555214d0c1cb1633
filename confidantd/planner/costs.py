"""What devices and links take for the parts of a plan, in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from confidantd.ids import DeviceId
from confidantd.planner.simulate import LinkCost, StageCost
from confidantd.planner.speeds import block_seconds
from confidantd.planner.workload import (
    PASSES,
    RECOMPUTED_SHARE,
    Form,
    Workload,
    head_flops,
    stage_flops,
    trained_parameters,
)
from confidantd.wire.links import Link
from confidantd.wire.speeds import Speeds

ASSUMED_GFLOPS = 5.0  # of a device that has not been measured: a slow phone
ASSUMED_MBPS = 50.0  # of a link that has not been measured: ordinary Wi-Fi
ASSUMED_ROUND_TRIP_SECONDS = 0.005
GENERATION_EFFICIENCY = 0.05  # products with one row are bound by memory, not arithmetic
UPDATE_FLOPS = 120.0  # AdamW is bound by memory: of one parameter it takes as long as so many
# What a run of a program takes whatever it is fed, as if it were so many operations. Measured on
# blocks of 64, 256 and 768 with 1 to 4 sequences of 128 tokens: 0.22 ms a forward and 0.33 ms a
# backward, and for each parameter that is read, or whose gradient is written, 40 to 80.
CALL_FLOPS = 4e7
MOVE_FLOPS = 60.0
# Sending or receiving an activation, likewise: 0.2 ms and 0.5 ns a byte on a core of 80 GFLOP/s.
MESSAGE_FLOPS, MESSAGE_BYTE_FLOPS = 1.6e7, 40.0


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """A device as the planner sees it; `gflops` 0 and None are unmeasured.

    `speeds` were measured with blocks of the workload's shape; without them `gflops` counts.
    `links` are those to single other devices, as measured from this one; `bandwidth_mbps` and
    `round_trip_seconds` are its radio's, for pairs that nobody measured.
    """

    id: DeviceId
    name: str
    available_bytes: int
    gflops: float
    bandwidth_mbps: float | None = None
    round_trip_seconds: float | None = None
    backends: tuple[str, ...] = ("cpu",)
    speeds: Speeds | None = None
    links: Mapping[DeviceId, Link] = field(default_factory=dict, hash=False)


def layer_seconds(work: Workload, device: PlanDevice) -> float:
    """What every further layer adds to a stage's seconds of one microbatch (training) or one
    token (generation), with its part of the optimizer's. Messages are of the stage, not of it.
    """
    one, two = (stage_cost(work, device, layers, head=False) for layers in (1, 2))
    return microbatch_seconds(work, two) - microbatch_seconds(work, one)


def microbatch_seconds(work: Workload, cost: StageCost) -> float:
    """Of a stage: both passes, and its part of the optimizer's seconds."""
    return cost.forward + cost.backward + cost.update / work.microbatches


def stage_cost(
    work: Workload,
    device: PlanDevice,
    layers: int,
    *,
    head: bool,
    embedding: bool = False,
    form: Form = "saved",
) -> StageCost:
    """Seconds of forward and backward of one microbatch in training, and of the optimizer.

    A head that was not measured runs at the blocks' pace. A stage receives from the one before
    it and sends to the one behind it in a forward, and in a backward the other way.
    """
    speeds = device.speeds or assumed_speeds(work, device.gflops or ASSUMED_GFLOPS)
    forward, backward = block_seconds(speeds, "saved" if work.method is None else form)
    ends = speeds.embedding if embedding else 0.0
    if head and speeds.head is None:
        pace = (speeds.forward + speeds.backward) / stage_flops(work, 1, head=False)
        ends += pace * head_flops(work)
    elif head and speeds.head is not None:
        ends += speeds.head
    trained = trained_parameters(work, layers, embedding=embedding, head=head)
    messages = speeds.message * ((not embedding) + (not head))
    return StageCost(
        layers * forward + messages,
        layers * backward + ends + messages,
        trained * speeds.update,
        messages,
    )


def assumed_speeds(work: Workload, gflops: float) -> Speeds:
    """What a device of this speed (float32 products) takes, where nothing was measured."""
    if work.method is None:
        pace = 1 / (gflops * GENERATION_EFFICIENCY * 1e9)  # a call and its weights are in it
        a_token = pace * stage_flops(work, 1, head=False)
        return Speeds(a_token, forward_again=a_token, head=pace * head_flops(work))
    pace = 1 / (gflops * 1e9)
    passes = PASSES[work.method]
    products = pace * stage_flops(work, 1, head=False) / passes
    forward = products + pace * _run_flops(work.block_parameters)
    backward = (passes - 1) * (products + pace * MOVE_FLOPS * work.block_parameters)
    backward += pace * CALL_FLOPS
    table = work.embedding_parameters if work.method == "full" else 0
    return Speeds(
        forward=forward,
        backward=backward,
        forward_again=forward,
        backward_again=backward + RECOMPUTED_SHARE * forward,
        head=pace * (head_flops(work) + _run_flops((passes - 1) * work.head_parameters)),
        embedding=pace * _run_flops(2 * table) if table else 0.0,
        update=pace * UPDATE_FLOPS,
        message=pace * (MESSAGE_FLOPS + MESSAGE_BYTE_FLOPS * work.activation_bytes),
    )


def _run_flops(moved_parameters: float) -> float:
    """What one run of a program takes besides its products, as if it were operations."""
    return CALL_FLOPS + MOVE_FLOPS * moved_parameters


def link_cost(work: Workload, first: PlanDevice, second: PlanDevice) -> LinkCost:
    """What one activation takes from one device to another.

    Of a pair that both measured the slower direction counts, since gradients go back. A pair
    that nobody measured is as fast as the slower radio.
    """
    ends = ((first, second), (second, first))
    links = [one.links[other.id] for one, other in ends if other.id in one.links]
    rates = [link.mbps for link in links if link.mbps is not None]
    mbps = min(rates or [d.bandwidth_mbps or ASSUMED_MBPS for d in (first, second)])
    seconds = 8 * work.activation_bytes / (mbps * 1e6)
    return LinkCost(seconds, _round_trip(links, first, second) / 2)


def _round_trip(links: Sequence[Link], first: PlanDevice, second: PlanDevice) -> float:
    """Seconds; whatever is above the least of what both saw, a busy device has added."""
    seen = [link.round_trip_ms / 1000 for link in links if link.round_trip_ms is not None]
    trips = [d.round_trip_seconds for d in (first, second) if d.round_trip_seconds is not None]
    return min(seen) if seen else max(trips, default=ASSUMED_ROUND_TRIP_SECONDS)
