"""Serving many requests at once: the busiest stage or link bounds it, or the round of a few."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.planner.costs import PlanDevice
from confidantd.planner.memory import LEFT_ROWS, stage_memory
from confidantd.planner.pace import NOTHING, round_before, round_behind, round_seconds
from confidantd.planner.simulate import LinkCost
from tests.unit.planner_support import GIGABYTE, SWARMS, device, make_plan, workload

SECONDS = st.integers(0, 9).map(float)


def closed(stages: Sequence[float], links: Sequence[LinkCost], requests: int) -> float:
    """As the planner builds it up; the last link goes back to the first stage."""
    suffix = NOTHING
    for index in range(len(stages) - 1, -1, -1):
        if index < len(stages) - 1:
            suffix = round_behind(suffix, links[index], requests)
        suffix = round_before(suffix, stages[index], requests)
    return round_seconds(suffix, links[-1] if len(stages) > 1 else None, requests)


def simulated(stages: Sequence[float], links: Sequence[LinkCost], requests: int) -> float:
    """Mean seconds of a round after the first few: every token waits for its turn everywhere."""
    busy, waits = [], []  # of stages and links in turn: seconds it is busy, and it takes on top
    for stage, link in zip(stages, links, strict=True):
        busy += [stage, link.seconds] if len(stages) > 1 else [stage]
        waits += [0.0, link.latency] if len(stages) > 1 else [0.0]
    free = [0.0] * len(busy)
    tokens = [(0.0, request, 0, 0) for request in range(requests)]  # time, who, where, rounds
    settled, rounds = 40, 120
    ends = {}
    while tokens:
        now, request, place, done = heapq.heappop(tokens)
        free[place] = max(now, free[place]) + busy[place]
        then, following = free[place] + waits[place], (place + 1) % len(busy)
        done += following == 0
        if following == 0 and request == requests - 1:
            ends[done] = then
        if done < rounds:
            heapq.heappush(tokens, (then, request, following, done))
    return (ends[rounds] - ends[settled]) / (rounds - settled)


@settings(deadline=None, max_examples=50)
@given(
    stages=st.lists(SECONDS.filter(bool), min_size=1, max_size=4),
    links=st.lists(st.builds(LinkCost, SECONDS, SECONDS), min_size=4, max_size=4),
    requests=st.integers(1, 9),
)
def test_the_closed_form_is_what_a_queue_settles_at(
    stages: list[float], links: list[LinkCost], requests: int
) -> None:
    links = links[: len(stages)]
    expected = simulated(stages, links, requests)
    assert closed(stages, links, requests) == pytest.approx(expected, rel=0.02)


def test_one_request_is_generation() -> None:
    devices = [device("a", available_bytes=GIGABYTE // 2), device("b")]
    one = make_plan(workload(method=None, load=1), devices, devices[0].id)
    generated = make_plan(workload(method=None), devices, devices[0].id)
    assert one.seconds == generated.seconds
    assert (one.objective, generated.objective) == ("serve", "generate")


def test_few_requests_stay_on_one_device_and_many_fill_a_pipeline() -> None:
    devices = [device(name) for name in "abc"]
    few = make_plan(workload(method=None, load=1), devices, devices[0].id)
    many = make_plan(workload(method=None, load=16), devices, devices[0].id)
    assert len(few.stages) == 1
    assert len(many.stages) == 3
    assert many.tokens_per_second > 2 * few.tokens_per_second
    assert many.tokens_per_second == pytest.approx(16 / many.seconds)
    assert many.to_json()["objective"] == "serve"
    assert many.to_json()["load"] == 16


@given(devices=SWARMS, load=st.integers(1, 20), more=st.integers(1, 20))
def test_more_requests_are_never_fewer_tokens_where_memory_is_plenty(
    devices: list[PlanDevice], load: int, more: int
) -> None:
    rich = [replace(d, available_bytes=100 * GIGABYTE) for d in devices]
    found = [
        make_plan(workload(method=None, load=count), rich, rich[0].id)
        for count in (load, load + more)
    ]
    # the text stays with its owner unless that costs 5 %
    assert found[1].tokens_per_second >= found[0].tokens_per_second / 1.05 * (1 - 1e-8)


def test_every_request_has_a_cache() -> None:
    def cache(load: int) -> int:
        work = workload(method=None, load=load)
        return stage_memory(work, 6, embedding=True, head=True, stage=0, stages=1).cache

    assert cache(1) == 2 * 4 * 768 * 128 * (6 * 1.25 + 1)  # a quarter is room to grow
    each = (cache(8) - cache(4)) / 4  # and rows that others left
    assert each == pytest.approx(2 * 4 * 6 * 768 * 128 * 1.25 * LEFT_ROWS)
    assert cache(108) - cache(8) == pytest.approx(100 * each)
    assert cache(1) == cache(0)
