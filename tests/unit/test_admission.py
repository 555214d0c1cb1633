"""The queue of requests: bounded, in turns, and no place is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import BusyError
from confidantd.jobs.admission import Admission


def test_clients_take_turns() -> None:
    """Who has many in the queue holds up nobody with one."""

    async def run() -> list[str]:
        admission, order = Admission(1, 10), list[str]()
        first = await admission.enter("greedy")

        async def ask(client: str) -> None:
            place = await admission.enter(client)
            order.append(client)
            place.leave()
            place.leave()  # once is enough

        async with asyncio.TaskGroup() as group:
            for client in ("greedy", "greedy", "greedy", "other", "third", "other"):
                group.create_task(ask(client))
            await asyncio.sleep(0)
            assert admission.waiting == 6
            first.leave()
        assert admission.waiting == 0
        return order

    assert asyncio.run(run()) == ["greedy", "other", "third", "greedy", "other", "greedy"]


def test_the_queue_ends_somewhere() -> None:
    async def run() -> None:
        admission = Admission(1, 1)
        place = await admission.enter("a")
        waiting = asyncio.create_task(admission.enter("b"))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="1 requests wait"):
            await admission.enter("c")
        place.leave()
        (await waiting).leave()
        (await admission.enter("c")).leave()

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_no_place_is_lost_whoever_goes_away(most: int, seed: int) -> None:
    """In the queue, with a place, or in the moment in which it is given one."""

    async def run() -> None:
        choose, admission, held = random.Random(seed), Admission(most, 8), 0

        async def ask(client: str) -> None:
            nonlocal held
            try:
                place = await admission.enter(client)
            except BusyError:
                return
            held += 1
            assert held <= most
            try:
                for _ in range(choose.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                held -= 1
                place.leave()

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(ask(choose.choice("abc"))))
            if choose.random() < 0.5:
                choose.choice(tasks).cancel()
            if choose.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.wait(tasks)
        assert admission.waiting == 0
        places = [await admission.enter("a") for _ in range(most)]
        for place in places:
            place.leave()

    asyncio.run(run())
