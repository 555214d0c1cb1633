"""When links are measured, what of them is gossiped, and what of gossip is believed."""

from __future__ import annotations

import random

import pytest

from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId, digest_of
from confidantd.swarm.links import (
    EVERY_SECONDS,
    LEAST_PAUSE_SECONDS,
    SECOND_SECONDS,
    SETTLE_SECONDS,
    Candidate,
    LinkSchedule,
    smoothed,
)
from confidantd.swarm.member import Member
from confidantd.swarm.membership import _checked
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.links import MAX_LINKS, Link
from confidantd.wire.messages import Beat, Rank
from tests.component.swarm_support import resources

A, B, C = (DeviceId(letter * 64) for letter in "abc")
INF, NAN = float("inf"), float("nan")


def schedule(me: DeviceId = A) -> LinkSchedule:
    return LinkSchedule(me, random.Random(1))


def idle(*devices: DeviceId) -> list[Candidate]:
    return [Candidate(device, measured=False, working=False) for device in devices]


def test_one_of_a_pair_begins_and_the_other_waits() -> None:
    first, second = schedule(A), schedule(B)
    first.connected(B, 0.0)
    second.connected(A, 0.0)
    assert first.next(idle(B), SETTLE_SECONDS - 0.1) is None
    assert first.next(idle(B), SETTLE_SECONDS) == B
    assert second.next(idle(A), SECOND_SECONDS - 0.1) is None
    assert second.next(idle(A), SECOND_SECONDS) == A


def test_the_one_that_waited_longest_is_next_and_then_it_waits_long() -> None:
    found = schedule()
    found.connected(C, 0.0)
    found.connected(B, 1.0)
    assert found.next(idle(B, C), 10.0) == C
    found.measured(C, 10.0, members=2)
    assert found.next(idle(B, C), 10.0) == B
    found.measured(B, 11.0, members=2)
    assert found.next(idle(B, C), 10.0 + 0.79 * EVERY_SECONDS) is None
    assert found.next(idle(B, C), 11.0 + 1.2 * EVERY_SECONDS) is not None


def test_many_members_are_measured_less_often() -> None:
    found = schedule()
    found.connected(B, 0.0)
    found.measured(B, 0.0, members=40)
    assert found.next(idle(B), 0.79 * 40 * LEAST_PAUSE_SECONDS) is None


def test_a_running_job_is_not_disturbed_for_a_second_value() -> None:
    found = schedule()
    found.connected(B, 0.0)
    assert found.next([Candidate(B, measured=True, working=True)], 10.0) is None
    assert found.next([Candidate(B, measured=False, working=True)], 10.0) == B
    assert found.next([Candidate(B, measured=True, working=False)], 10.0) == B


def test_who_is_occupied_is_asked_later_and_later() -> None:
    found, pauses, now = schedule(), [], 0.0
    found.connected(B, 0.0)
    for _ in range(12):
        found.failed(B, now)
        due = next(now + s for s in range(10_000) if found.next(idle(B), now + s) == B)
        pauses.append(due - now)
        now = due
    assert pauses[0] < 10
    assert max(pauses) <= 1.5 * EVERY_SECONDS + 1
    assert min(pauses[-3:]) >= 0.5 * EVERY_SECONDS
    found.connected(B, now)  # by another way, maybe
    assert found.next(idle(B), now + SETTLE_SECONDS) == B


def test_a_transfer_moves_the_value_by_a_quarter() -> None:
    assert smoothed(None, 80.0) == 80.0
    assert smoothed(40.0, 80.0) == 50.0


def beat(links: dict[DeviceId, Link]) -> Beat:
    return Beat(1, 0, Rank(), (), resources=resources(1), links=links)


def test_links_travel_with_full_heartbeats() -> None:
    sent = beat({B: Link(20.5, 3.0), C: Link(None, 1.0)})
    got = _checked(from_map(Beat, unpack(pack(to_map(sent)))))
    member = Member(A)
    member.heard(got, 0.0)
    assert member.links == {B: Link(20.5, 3.0), C: Link(None, 1.0)}
    member.heard(Beat(2, 0, Rank(), ()), 1.0)  # a short one leaves out what has not changed
    assert member.links[B].mbps == 20.5


@pytest.mark.parametrize(
    "links",
    [
        {B: Link(mbps)} for mbps in (0.0, -1.0, 1e9, INF, NAN)
    ] + [
        {B: Link(1.0, trip)} for trip in (-0.1, 1e9, INF, NAN)
    ] + [
        {DeviceId("nobody"): Link(1.0)},
        {DeviceId(digest_of(bytes([i // 256, i % 256]))): Link(1.0) for i in range(MAX_LINKS + 1)},
    ],
)  # fmt: skip
def test_impossible_links_end_the_connection(links: dict[DeviceId, Link]) -> None:
    with pytest.raises(ProtocolError, match="impossible links"):
        _checked(beat(links))
