"""Who belongs to a swarm, from what members say of each other."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import DeviceError
from confidantd.identity.ledger import Ledger
from confidantd.ids import DeviceId, digest_of
from confidantd.wire.roster import MAX_CHANGE, MAX_STATEMENTS, Statement


def named(name: str) -> DeviceId:
    return DeviceId(digest_of(name.encode()))


ANNA, BEN, CLEO, DORA, EVE = (named(name) for name in ("anna", "ben", "cleo", "dora", "eve"))
EVERYONE = (ANNA, BEN, CLEO, DORA, EVE)


def admits(author: DeviceId, device: DeviceId, change: int = 1) -> Statement:
    return Statement(author, device, change, f"certificate of {device}")


def met(me: DeviceId, *others: DeviceId) -> Ledger:
    """The ledger of a device that let others in."""
    ledger = Ledger(me)
    for other in others:
        assert ledger.say(admits(me, other))
    return ledger


def members(ledger: Ledger) -> set[DeviceId]:
    return set(ledger.members)


def test_members_vouch_for_members_in_whatever_order_they_are_heard() -> None:
    chain = [admits(BEN, CLEO), admits(CLEO, DORA), admits(DORA, EVE)]
    for order in itertools.permutations(chain):
        ledger = met(ANNA, BEN)
        assert ledger.take(order)
        assert members(ledger) == {BEN, CLEO, DORA, EVE}
        assert not ledger.take(order)
        assert ledger.members[DORA] == f"certificate of {DORA}"
        assert ledger.introducers(DORA) == {CLEO}


def test_a_stranger_vouches_for_nobody_nor_anybody_for_itself() -> None:
    ledger = met(ANNA, BEN)
    assert not ledger.take([admits(EVE, DORA), admits(EVE, EVE), admits(BEN, BEN, 3)])
    assert members(ledger) == {BEN}


def test_removed_is_removed_also_where_others_still_vouch() -> None:
    ledger = met(ANNA, BEN, CLEO)
    ledger.take([admits(BEN, CLEO)])
    ledger.say(ledger.removal(CLEO))
    assert members(ledger) == {BEN}
    assert ledger.take([admits(DORA, CLEO), admits(BEN, DORA)])  # who was off has it on its list
    assert members(ledger) == {BEN, DORA}
    again = ledger.admission(CLEO, "certificate", 0)
    assert again is not None
    ledger.say(again)
    assert CLEO in members(ledger)


def test_an_inviter_that_does_not_know_of_a_removal_hears_it_from_the_device_itself() -> None:
    told = met(ANNA, BEN, CLEO)
    told.say(told.removal(CLEO))
    unaware = met(BEN, ANNA)
    invited = unaware.admission(CLEO, f"certificate of {CLEO}", gone=told.removal_of(CLEO))
    assert invited is not None
    unaware.say(invited)
    told.take(unaware.statements)
    unaware.take(told.statements)
    assert CLEO in members(told)
    assert CLEO in members(unaware)


def test_what_a_removed_device_said_counts_as_far_as_its_remover_knew_it() -> None:
    anna = met(ANNA, BEN, CLEO)
    anna.take([admits(CLEO, DORA)])  # let in by cleo, and known to anna
    anna.say(anna.removal(CLEO))
    assert members(anna) == {BEN, DORA}
    away = met(BEN, ANNA, CLEO)  # has not heard of it
    away.take([admits(CLEO, EVE), admits(CLEO, DORA)])  # eve is cleo's second identity
    away.take([Statement(CLEO, ANNA, 1)])  # and cleo takes its revenge
    assert members(away) == {CLEO, EVE, DORA}
    away.take([admits(DORA, ANNA)])  # vouched for again? not over a removal
    assert ANNA not in members(away)
    heard = met(BEN, ANNA, CLEO)
    heard.take([admits(CLEO, EVE), admits(CLEO, DORA)])
    assert heard.take(anna.statements)
    assert members(heard) == {ANNA, DORA}
    assert not heard.take([admits(CLEO, EVE, 5), Statement(CLEO, ANNA, 7)])
    assert members(heard) == {ANNA, DORA}


def test_whom_a_dropped_device_vouched_for_goes_with_it() -> None:
    ledger = met(ANNA, BEN, CLEO)
    before = ledger.removal(CLEO)
    ledger.take([admits(CLEO, EVE), admits(EVE, DORA), Statement(EVE, BEN, 1)])
    assert members(ledger) == {CLEO, EVE, DORA}
    ledger.say(before)  # of when nothing was known that cleo said
    assert members(ledger) == {BEN}


def test_a_huge_number_keeps_nobody_in() -> None:
    ledger = met(ANNA, BEN)
    ledger.take([admits(BEN, EVE, MAX_CHANGE - 1)])
    assert EVE in members(ledger)
    ledger.say(ledger.removal(EVE))
    assert members(ledger) == {BEN}
    with pytest.raises(DeviceError, match="too often"):
        ledger.admission(EVE, "certificate", 0)
    with pytest.raises(DeviceError, match="too often"):
        ledger.admission(DORA, "certificate", gone=MAX_CHANGE - 1)


def test_what_cannot_be_a_statement_is_none() -> None:
    ledger = met(ANNA, BEN)
    wrong = [
        admits(BEN, EVE, 0), admits(BEN, EVE, -1), admits(BEN, EVE, MAX_CHANGE),
        admits(BEN, DeviceId("../etc")), Statement(BEN, EVE, 1, "x", (digest_of(b""),)),
        Statement(BEN, EVE, 1, keeps=(digest_of(b""),) * (MAX_STATEMENTS + 1)),
        Statement(BEN, EVE, 1, keeps=(DeviceId("x"),)),  # type: ignore[arg-type]
    ]  # fmt: skip
    assert not ledger.take(wrong)


def test_a_device_knows_when_it_was_removed_and_is_let_in_again() -> None:
    ben = met(BEN, ANNA)
    ben.take([admits(ANNA, BEN)])
    assert not ben.removed_me
    ben.take([Statement(ANNA, BEN, 1)])
    assert ben.removed_me
    alone = Ledger(BEN, gone=ben.removal_of(BEN))
    alone.say(admits(BEN, ANNA))
    alone.take([admits(ANNA, BEN), Statement(ANNA, BEN, 1)])  # what anna still tells of then
    assert not alone.removed_me
    alone.take([admits(ANNA, BEN, 2)])
    assert not alone.removed_me
    alone.take([Statement(ANNA, BEN, 2)])
    assert alone.removed_me


def test_whoever_leaves_takes_nobody_along() -> None:
    cleo = met(CLEO, ANNA, BEN)
    cleo.take([admits(ANNA, CLEO)])
    anna = met(ANNA, CLEO)
    anna.take(cleo.statements)
    assert members(anna) == {BEN, CLEO}
    assert anna.take([cleo.removal(CLEO)])
    assert members(anna) == {BEN}  # whom cleo let in, and anna never met


def test_who_comes_back_hears_whom_it_had_let_in_and_removed_itself() -> None:
    ledger = met(ANNA, BEN)
    assert ledger.take([admits(ANNA, CLEO), admits(ANNA, EVE), Statement(ANNA, EVE, 1)])
    assert members(ledger) == {BEN, CLEO}


def test_a_swarm_has_its_limit() -> None:
    ledger = met(ANNA, BEN)
    ledger.take(admits(BEN, named(str(i))) for i in range(MAX_STATEMENTS + 5))
    assert len(ledger.statements) == MAX_STATEMENTS


class Swarm:
    """Devices that invite and remove each other, each with its own view."""

    def __init__(self) -> None:
        self.ledgers = {device: Ledger(device) for device in EVERYONE}
        self.inside = {ANNA}

    def gossip(self) -> None:
        """All inside tell all."""
        told = [s for device in self.inside for s in self.ledgers[device].statements]
        for device in self.inside:
            self.ledgers[device].take(told)

    def invite(self, one: DeviceId, other: DeviceId) -> None:
        """Each lets the other in."""
        gone = {device: self.ledgers[device].gone for device in (one, other)}
        for me, them in ((one, other), (other, one)):
            made = self.ledgers[me].admission(them, f"certificate of {them}", gone[them])
            if made is not None:
                self.ledgers[me].say(made)
        self.inside.add(other)

    def remove(self, one: DeviceId, other: DeviceId) -> None:
        """It hears of it."""
        self.gossip()  # nobody removes what it does not see
        removal = self.ledgers[one].removal(other)
        self.ledgers[one].say(removal)
        self.inside.discard(other)
        self.ledgers[other] = Ledger(other, gone=removal.change)


@given(seed=st.integers(0, 10_000))
def test_all_come_to_know_the_same_in_the_end(seed: int) -> None:
    draw, swarm = random.Random(seed), Swarm()
    for _ in range(12):
        actor, other = draw.choice(sorted(swarm.inside)), draw.choice(EVERYONE)
        if other not in swarm.inside:
            swarm.invite(actor, other)
        elif other != actor and draw.random() < 0.6:
            swarm.remove(actor, other)
        if draw.random() < 0.7:
            swarm.gossip()
    swarm.gossip()
    swarm.gossip()
    for device in swarm.inside:
        assert members(swarm.ledgers[device]) == swarm.inside - {device}
