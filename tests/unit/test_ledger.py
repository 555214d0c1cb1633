"""Who belongs to a swarm, from what members say of each other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import DeviceError
from confidantd.identity.ledger import Ledger
from confidantd.ids import DeviceId, digest_of
from confidantd.wire.roster import (
    MAX_CERTIFICATE_CHARACTERS,
    MAX_CHANGE,
    MAX_OF_AUTHOR,
    MAX_ROSTER_BYTES,
    MAX_STATEMENTS,
    Statement,
)


def named(name: str) -> DeviceId:
    return DeviceId(digest_of(name.encode()))


ANNA, BEN, CLEO, DORA, EVE, EVE2, EVE3 = (
    named(name) for name in ("anna", "ben", "cleo", "dora", "eve", "eve2", "eve3")
)
EVERYONE = (ANNA, BEN, CLEO, DORA, EVE)


def admits(author: DeviceId, device: DeviceId, change: int = 1) -> Statement:
    return Statement(author, device, change, f"certificate of {device}")


def removes(author: DeviceId, device: DeviceId, change: int = 1) -> Statement:
    return Statement(author, device, change)


def met(me: DeviceId, *others: DeviceId) -> Ledger:
    """The ledger of a device that let others in."""
    ledger = Ledger(me)
    for other in others:
        ledger.admit(other, f"certificate of {other}")
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
        assert Ledger(ANNA, 0, ledger.statements).members == ledger.members


def test_a_stranger_vouches_for_nobody_nor_anybody_for_itself() -> None:
    ledger = met(ANNA, BEN)
    assert not ledger.take([admits(EVE, DORA), admits(EVE, EVE), admits(BEN, BEN, 3)])
    assert members(ledger) == {BEN}


def test_removed_is_removed_also_where_others_still_vouch() -> None:
    ledger = met(ANNA, BEN, CLEO)
    ledger.take([admits(BEN, CLEO)])
    ledger.remove(CLEO)
    assert members(ledger) == {BEN}
    ledger.take([admits(DORA, CLEO), admits(BEN, DORA)])  # who was off has it on its list
    assert members(ledger) == {BEN, DORA}
    ledger.admit(CLEO, "certificate")
    assert CLEO in members(ledger)


def test_an_inviter_that_does_not_know_of_a_removal_hears_it_from_the_device_itself() -> None:
    told = met(ANNA, BEN, CLEO)
    told.take([admits(BEN, ANNA)])
    told.remove(CLEO)
    unaware = met(BEN, ANNA)
    unaware.admit(CLEO, f"certificate of {CLEO}", gone=1)
    told.take(unaware.statements)
    unaware.take(told.statements)
    assert CLEO in members(told)
    assert CLEO in members(unaware)


def test_who_removes_a_device_keeps_what_it_believed_of_it() -> None:
    anna = met(ANNA, BEN, CLEO)
    anna.take([admits(CLEO, DORA), admits(BEN, EVE), removes(CLEO, EVE)])
    assert members(anna) == {BEN, CLEO, DORA}
    assert anna.depending_on(CLEO) == {DORA}
    anna.remove(CLEO)
    assert members(anna) == {BEN, DORA}  # dora stays in, and eve out
    newcomer = met(named("fred"), ANNA)
    newcomer.take(anna.statements)
    assert members(newcomer) == {ANNA, BEN, DORA}


def attacked(*said: Statement) -> Ledger:
    """Ben, who has not heard that Anna removed Eve, hears what Eve says; then he hears of it."""
    anna = met(ANNA, BEN, EVE)
    anna.take([admits(BEN, ANNA), admits(BEN, EVE)])
    anna.remove(EVE)
    ben = met(BEN, ANNA, EVE)
    ben.take(said)
    ben.take(anna.statements)
    anna.take(ben.statements)
    assert members(anna) == {BEN}
    return ben


@pytest.mark.parametrize(
    "said",
    [
        [admits(EVE, EVE2)],
        [admits(EVE, EVE2), admits(EVE, EVE3), admits(EVE2, EVE3), admits(EVE3, EVE2)],
        [admits(EVE, EVE2), admits(EVE2, EVE, 2), admits(EVE2, EVE3)],
        [
            admits(EVE, EVE2),
            Statement(EVE, EVE, MAX_CHANGE - 1, keeps=(admits(EVE, EVE2).id,)),
        ],
        [admits(EVE, EVE2), Statement(EVE, EVE, 1, keeps=(admits(EVE, EVE2).id,))],
        [removes(EVE, DORA, MAX_CHANGE - 1)],
    ],
    ids=["second identity", "ring", "let in again", "leaves late", "leaves", "number"],
)
def test_what_a_removed_device_says_where_it_is_still_believed_goes_with_it(
    said: list[Statement],
) -> None:
    ben = attacked(*said)
    assert members(ben) == {ANNA}
    assert not any(s.author in (EVE2, EVE3) for s in ben.statements)
    ben.take(said)
    assert members(ben) == {ANNA}
    assert members(Ledger(BEN, 0, ben.statements)) == {ANNA}


def test_of_two_that_remove_each_other_the_one_that_was_heard_first_counts() -> None:
    ledger = met(BEN, ANNA, EVE)
    ledger.take([removes(ANNA, EVE)])
    ledger.take([removes(EVE, ANNA)])
    assert members(ledger) == {ANNA}
    other = met(BEN, ANNA, EVE)
    other.take([removes(EVE, ANNA), removes(ANNA, EVE)])
    assert members(other) == {EVE}


def test_revenge_ends_with_the_one_who_takes_it() -> None:
    ledger = met(ANNA, BEN, EVE)
    ledger.take([admits(BEN, DORA), removes(EVE, DORA, MAX_CHANGE - 1)])
    assert members(ledger) == {BEN, EVE}
    ledger.take([removes(BEN, EVE)])
    assert members(ledger) == {BEN, DORA}


def test_a_huge_number_keeps_nobody_in_and_its_victim_is_no_worse_off() -> None:
    ledger = met(ANNA, BEN)
    ledger.take([admits(BEN, EVE, MAX_CHANGE - 1)])
    assert EVE in members(ledger)
    ledger.remove(EVE)
    assert members(ledger) == {BEN}
    with pytest.raises(DeviceError, match="too high"):
        ledger.admit(EVE, "certificate")
    victim = met(DORA, ANNA)
    victim.take([admits(ANNA, DORA), admits(ANNA, EVE), removes(EVE, DORA, MAX_CHANGE - 1)])
    assert victim.removed_me
    assert victim.gone_now == 2


def test_what_cannot_be_a_statement_is_none() -> None:
    ledger = met(ANNA, BEN)
    kept = digest_of(b"")
    wrong = [
        admits(BEN, EVE, 0), admits(BEN, EVE, -1), admits(BEN, EVE, MAX_CHANGE),
        admits(BEN, DeviceId("../etc")), Statement(BEN, EVE, 1, "x", (kept,)),
        Statement(BEN, BEN, 1, keeps=(kept,) * (MAX_OF_AUTHOR + 1)),
        Statement(BEN, BEN, 1, keeps=(DeviceId("x"),)),  # type: ignore[arg-type]
        Statement(BEN, EVE, 1, "x" * (MAX_CERTIFICATE_CHARACTERS + 1)),
    ]  # fmt: skip
    assert not ledger.take(wrong)


def test_a_device_knows_when_it_was_removed_and_is_let_in_again() -> None:
    ben = met(BEN, ANNA)
    ben.take([admits(ANNA, BEN)])
    assert not ben.removed_me
    ben.take([removes(ANNA, BEN)])
    assert ben.removed_me
    alone = Ledger(BEN, ben.gone_now)
    alone.admit(ANNA, f"certificate of {ANNA}")
    alone.take([admits(ANNA, BEN), removes(ANNA, BEN)])  # what anna still tells of then
    assert not alone.removed_me
    alone.take([admits(ANNA, BEN, 2)])
    assert not alone.removed_me
    alone.take([removes(ANNA, BEN, 2)])
    assert alone.removed_me


def test_whoever_leaves_takes_nobody_along() -> None:
    cleo = met(CLEO, ANNA, BEN)
    cleo.take([admits(ANNA, CLEO), admits(ANNA, EVE)])
    cleo.remove(EVE)
    anna = met(ANNA, CLEO)
    anna.take([admits(ANNA, EVE), *cleo.statements])
    assert members(anna) == {BEN, CLEO}
    assert anna.take([cleo.farewell()])
    assert members(anna) == {BEN}  # whom cleo let in, and not whom it removed
    anna.take([admits(CLEO, DORA), removes(CLEO, BEN)])  # what it says afterwards is nothing
    assert members(anna) == {BEN}
    newcomer = met(DORA, ANNA)
    newcomer.take(anna.statements)
    assert members(newcomer) == {ANNA, BEN}


def test_who_comes_back_hears_whom_it_had_let_in_and_removed_itself() -> None:
    ledger = met(ANNA, BEN)
    assert ledger.take([admits(ANNA, CLEO), admits(ANNA, EVE), removes(ANNA, EVE)])
    assert members(ledger) == {BEN, CLEO}


def size(statements: Iterable[Statement]) -> int:
    return sum(s.size for s in statements)


def test_nobody_fills_the_list_so_that_it_cannot_be_removed() -> None:
    ledger = met(ANNA, BEN, EVE)
    sybils = [named(f"sybil {i}") for i in range(40)]
    flood = [admits(EVE, sybil) for sybil in sybils]
    flood += [admits(s, named(f"{s} {i}")) for s in sybils for i in range(MAX_OF_AUTHOR)]
    flood += [removes(s, named(f"{s} {i} {i}")) for s in sybils for i in range(MAX_OF_AUTHOR)]
    ledger.take(flood)
    assert len(ledger.statements) <= MAX_STATEMENTS
    assert size(ledger.statements) <= MAX_ROSTER_BYTES
    full = ledger.copy()
    full.take([removes(BEN, EVE)])  # by others as well
    assert members(full) == {BEN}
    ledger.admit(CLEO, "certificate")
    assert CLEO in members(ledger)


def test_an_author_says_so_much_and_no_more() -> None:
    ledger = met(ANNA, BEN, CLEO)
    long = "x" * MAX_CERTIFICATE_CHARACTERS
    ledger.take(Statement(BEN, named(str(i)), 1, long) for i in range(3 * MAX_OF_AUTHOR))
    assert sum(s.author == BEN for s in ledger.statements) == MAX_OF_AUTHOR
    ledger.take([admits(BEN, DORA, n) for n in range(1, 50)])
    assert sum(s.author == BEN for s in ledger.statements) == MAX_OF_AUTHOR


class Swarm:
    """Devices that invite and remove each other, each with its own view."""

    def __init__(self) -> None:
        self.ledgers = {device: Ledger(device) for device in EVERYONE}
        self.inside = {ANNA}

    def gossip(self) -> None:
        """All inside tell all."""
        told = [s for device in sorted(self.inside) for s in self.ledgers[device].statements]
        for device in self.inside:
            self.ledgers[device].take(told)

    def invite(self, one: DeviceId, other: DeviceId) -> None:
        """Each lets the other in."""
        gone = {device: self.ledgers[device].gone for device in (one, other)}
        for me, them in ((one, other), (other, one)):
            self.ledgers[me].admit(them, f"certificate of {them}", gone[them])
        self.inside.add(other)

    def remove(self, one: DeviceId, other: DeviceId) -> None:
        """It hears of it."""
        self.gossip()  # nobody removes what it does not see
        self.ledgers[one].remove(other)
        self.ledgers[other].take(self.ledgers[one].statements)
        assert self.ledgers[other].removed_me
        self._out(other)

    def leave(self, one: DeviceId) -> None:
        """All hear of it."""
        self.gossip()
        said = self.ledgers[one].farewell()
        for device in self.inside - {one}:
            self.ledgers[device].take([said])
        self._out(one)

    def _out(self, device: DeviceId) -> None:
        self.inside.discard(device)
        self.ledgers[device] = Ledger(device, self.ledgers[device].gone_now)


@settings(max_examples=1500, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_all_come_to_know_the_same_in_the_end(seed: int) -> None:
    draw, swarm = random.Random(seed), Swarm()
    for _ in range(12):
        actor, other = draw.choice(sorted(swarm.inside)), draw.choice(EVERYONE)
        if other not in swarm.inside:
            swarm.invite(actor, other)
        elif other != actor and draw.random() < 0.5:
            swarm.remove(actor, other)
        elif other == actor and len(swarm.inside) > 1 and draw.random() < 0.3:
            swarm.leave(actor)
        if draw.random() < 0.7:
            swarm.gossip()
    swarm.gossip()
    swarm.gossip()
    for device in swarm.inside:
        assert members(swarm.ledgers[device]) == swarm.inside - {device}
