"""What a device promises to jobs, over rounds of a negotiation and epochs of a job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from confidantd.errors import ProtocolError, StaleEpochError
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.grants import OFFER_SECONDS, Grants, Place
from confidantd.wire.jobs import Offer

JOB, OWNER, OTHER, BOSS = JobId("j" * 16), DeviceId("a"), DeviceId("b"), DeviceId("c")
OFFER = Offer(
    job=JOB, epoch=1, term=1, owner=OWNER, stage=0, stages=3, first_layer=0, past_last_layer=2,
    memory_bytes=100,
)  # fmt: skip
PROCESS = cast("Any", object())


def granted(*offers: Offer) -> Grants:
    """A device that has granted these at second 0."""
    found = Grants()
    for offer in offers:
        found.grant(offer, BOSS, 0.0)
    return found


def started(*offers: Offer) -> Grants:
    """A device that runs these."""
    found = granted(*offers)
    for offer in offers:
        held = found.starting(OWNER, Place(JOB, offer.epoch, offer.stage))
        held.process = PROCESS
        found.started(held)
    return found


def test_two_stages_of_a_job_count_together() -> None:
    grants = granted(OFFER, replace(OFFER, stage=2, memory_bytes=50))
    assert grants.bytes() == 150
    assert grants.find(OWNER, Place(JOB, 1, 2)).memory_bytes == 50


def test_what_is_not_started_is_forgotten() -> None:
    grants = granted(OFFER)
    grants.forget_expired(OFFER_SECONDS - 1)
    assert grants.bytes() == 100
    grants.forget_expired(OFFER_SECONDS + 1)
    assert grants.bytes() == 0
    running = started(OFFER)
    running.forget_expired(OFFER_SECONDS + 1)
    assert running.bytes() == 100


def test_a_later_round_replaces_an_earlier_one() -> None:
    grants = granted(OFFER, replace(OFFER, stage=1, memory_bytes=30, round=1))
    assert grants.bytes() == 30
    with pytest.raises(ProtocolError):
        grants.find(OWNER, Place(JOB, 1, 0))


def test_a_running_stage_goes_on_in_the_next_epoch() -> None:
    grants = started(OFFER)
    following = replace(OFFER, epoch=2, stage=1, memory_bytes=150, goes_on=0)
    grants.grant(following, BOSS, 0.0)
    assert grants.bytes() == 150
    assert grants.find(OWNER, Place(JOB, 1, 0)).process is PROCESS  # until it is started
    held = grants.starting(OWNER, Place(JOB, 2, 1))
    assert held.process is PROCESS
    assert grants.bytes() == 150
    with pytest.raises(StaleEpochError, match="epoch 2 here, not 1"):
        grants.find(OWNER, Place(JOB, 1, 0))


def test_both_ends_may_change_places() -> None:
    grants = started(OFFER, replace(OFFER, stage=2, memory_bytes=50))
    for old, new in ((0, 2), (2, 0)):
        grants.grant(replace(OFFER, epoch=2, stage=new, goes_on=old, memory_bytes=70), BOSS, 0.0)
    first = grants.find(OWNER, Place(JOB, 1, 0))
    assert grants.starting(OWNER, Place(JOB, 2, 2)) is first
    assert grants.starting(OWNER, Place(JOB, 2, 0)) is not first
    for held in grants:
        grants.started(held)
    assert grants.bytes() == 140
    assert grants.of_epoch(OWNER, JOB, 2) == list(grants)


def test_a_running_stage_stays_when_its_next_place_is_withdrawn_or_never_started() -> None:
    following = replace(OFFER, epoch=2, stage=1, memory_bytes=150, goes_on=0)
    for end in ("withdrawn", "expired"):
        grants = started(OFFER)
        grants.grant(following, BOSS, 0.0)
        if end == "withdrawn":
            grants.withdraw(JOB, 2, OTHER)  # not who asked for it
            assert grants.bytes() == 150
            grants.withdraw(JOB, 2, BOSS)
        else:
            grants.forget_expired(OFFER_SECONDS + 1)
        assert grants.bytes() == 100
        assert grants.find(OWNER, Place(JOB, 1, 0)).process is PROCESS


def test_a_job_that_was_let_go_of_may_begin_again() -> None:
    """Its owner is told so that it does not take it for a mistake."""
    with pytest.raises(StaleEpochError, match="no stage of job"):
        Grants().find(OWNER, Place(JOB, 1, 0))
    with pytest.raises(ProtocolError):
        granted(OFFER).find(OWNER, Place(JOB, 1, 1))


def test_nobody_gets_at_the_stages_of_another_owner() -> None:
    grants = started(OFFER)
    with pytest.raises(ProtocolError):
        grants.find(OTHER, Place(JOB, 1, 0))
    with pytest.raises(ProtocolError, match="another device"):
        grants.check(replace(OFFER, epoch=2, owner=OTHER, goes_on=0))
    with pytest.raises(ProtocolError):
        grants.of_epoch(OTHER, JOB, 1)
    assert grants.of_owner(OTHER) == []


def test_epochs_only_go_forward() -> None:
    grants = started(OFFER)
    with pytest.raises(StaleEpochError, match="already runs here"):
        grants.check(OFFER)
    with pytest.raises(StaleEpochError, match="does not run here"):
        grants.check(replace(OFFER, epoch=2, goes_on=1))
    grants.grant(replace(OFFER, epoch=5, goes_on=0), BOSS, 0.0)
    with pytest.raises(StaleEpochError, match="later epoch"):
        grants.check(replace(OFFER, epoch=4, goes_on=0))


def test_a_job_that_is_not_here_has_nothing_to_stop() -> None:
    assert Grants().of_epoch(OWNER, JOB, 1) == []


def test_what_a_stage_gives_back_counts_until_its_next_one_is_loaded() -> None:
    grants = started(OFFER)
    grants.grant(replace(OFFER, epoch=2, memory_bytes=40, goes_on=0), BOSS, 0.0)
    held = grants.starting(OWNER, Place(JOB, 2, 0))
    assert grants.bytes() == 100
    grants.started(held)
    assert grants.bytes() == 40


def test_the_owner_may_drop_an_epoch_that_comes_to_nothing() -> None:
    grants = started(OFFER)
    grants.grant(replace(OFFER, epoch=2, memory_bytes=150, goes_on=0), BOSS, 0.0)
    grants.drop(OTHER, JOB, 2)
    assert grants.bytes() == 150
    grants.drop(OWNER, JOB, 2)
    assert grants.bytes() == 100


def test_stages_that_did_not_go_on_are_known() -> None:
    grants = started(OFFER, replace(OFFER, stage=2))
    grants.grant(replace(OFFER, epoch=2, goes_on=0), BOSS, 0.0)
    (left,) = grants.before(OWNER, JOB, 2)
    assert left.offer.stage == 2


def test_a_stage_is_started_once() -> None:
    grants, place = granted(OFFER), Place(JOB, 1, 0)
    held = grants.starting(OWNER, place)
    with pytest.raises(ProtocolError, match="being started already"):
        grants.starting(OWNER, place)
    held.process = PROCESS
    grants.started(held)
    with pytest.raises(ProtocolError, match="already runs here"):
        grants.starting(OWNER, place)
