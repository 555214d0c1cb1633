"""The worker's inbox and credits: order, limits, and an end for every wait."""

from __future__ import annotations

import asyncio

import pytest

from confidantd.errors import PeerLostError, ProtocolError
from confidantd.ids import JobId
from confidantd.tasks import TaskSet
from confidantd.wire.frames import Frame, FrameKind
from confidantd.worker.credits import RETURNED_AT_ONCE, Credits, window
from confidantd.worker.inbox import Inbox

LOST = PeerLostError("the link broke")


def frame(kind: FrameKind, step: int = 0, microbatch: int = 0) -> Frame:
    """A frame of stage 1 with a payload of four bytes."""
    return Frame(JobId("j"), 1, kind, 1, step, microbatch, shape=(1,))


async def test_frames_are_found_by_kind_step_and_microbatch() -> None:
    inbox = Inbox(max_bytes=100)
    for microbatch in (1, 0):
        payload = memoryview(bytes([microbatch] * 4))
        inbox.put(frame(FrameKind.ACTIVATION, 5, microbatch), payload)
    for microbatch in (0, 1):
        _, payload = await inbox.take(FrameKind.ACTIVATION, 5, microbatch)
        assert bytes(payload) == bytes([microbatch] * 4)


async def test_a_wait_ends_when_the_frame_comes() -> None:
    inbox = Inbox(max_bytes=100)
    tasks = TaskSet("test")
    waiting = tasks.start(inbox.take(FrameKind.GRADIENT, 1, 0), "wait")
    await asyncio.sleep(0)
    inbox.put(frame(FrameKind.GRADIENT, 1), memoryview(b"abcd"))
    assert bytes((await waiting)[1]) == b"abcd"


async def test_the_same_frame_twice_is_refused() -> None:
    inbox = Inbox(max_bytes=100)
    inbox.put(frame(FrameKind.GRADIENT), memoryview(b"abcd"))
    with pytest.raises(ProtocolError, match="twice"):
        inbox.put(frame(FrameKind.GRADIENT), memoryview(b"abcd"))


async def test_a_flood_is_refused_and_taken_frames_make_room() -> None:
    inbox = Inbox(max_bytes=10)
    for microbatch in range(2):
        inbox.put(frame(FrameKind.ACTIVATION, 0, microbatch), memoryview(b"abcd"))
    with pytest.raises(ProtocolError, match="faster"):
        inbox.put(frame(FrameKind.ACTIVATION, 0, 2), memoryview(b"abcd"))
    await inbox.take(FrameKind.ACTIVATION, 0, 0)
    inbox.put(frame(FrameKind.ACTIVATION, 0, 2), memoryview(b"abcd"))


@pytest.mark.parametrize("kind", [FrameKind.ACTIVATION, FrameKind.HIDDEN])
async def test_a_lost_link_ends_every_wait_now_and_later(kind: FrameKind) -> None:
    inbox = Inbox(max_bytes=100)
    tasks = TaskSet("test")
    work = inbox.next(kind) if kind is FrameKind.HIDDEN else inbox.take(kind, 0, 0)
    waiting = tasks.start(work, "wait")
    await asyncio.sleep(0)
    inbox.fail(LOST)
    inbox.fail(PeerLostError("a later symptom"))
    with pytest.raises(PeerLostError, match="the link broke"):
        await waiting
    with pytest.raises(PeerLostError, match="the link broke"):
        await inbox.take(FrameKind.GRADIENT, 9, 9)


async def test_a_sender_waits_for_credit_and_goes_on_with_it() -> None:
    sender = Credits(2)
    await sender.acquire()
    await sender.acquire()
    tasks = TaskSet("test")
    third = tasks.start(sender.acquire(), "third")
    await asyncio.sleep(0)
    assert not third.done()
    sender.release()
    await third


async def test_credits_come_back_several_at_a_time() -> None:
    receiver, sender = Credits(0), Credits(0)
    assert [receiver.use() for _ in range(2 * RETURNED_AT_ONCE)].count(True) == 2
    sender.release()
    async with asyncio.timeout(1):
        for _ in range(RETURNED_AT_ONCE):
            await sender.acquire()
    tasks = TaskSet("test")
    waiting = tasks.start(sender.acquire(), "wait")
    await asyncio.sleep(0)
    assert not waiting.done()
    await tasks.close()


@pytest.mark.parametrize("stages", [2, 5, 6, 8, 30])
def test_1f1b_never_waits_for_a_credit_that_is_not_returned_yet(stages: int) -> None:
    most_unused = 2 * stages  # activations and gradients between two neighbours
    assert window(stages) - (RETURNED_AT_ONCE - 1) > most_unused


async def test_a_lost_link_ends_the_wait_for_credit() -> None:
    sender = Credits(0)
    tasks = TaskSet("test")
    waiting = tasks.start(sender.acquire(), "wait")
    await asyncio.sleep(0)
    sender.fail(LOST)
    with pytest.raises(PeerLostError):
        await waiting
    with pytest.raises(PeerLostError):
        await sender.acquire()
