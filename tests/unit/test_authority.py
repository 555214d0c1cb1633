"""Who may ask what: the table, and that nothing is answered that is not in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from confidantd.errors import NotAllowedError
from confidantd.ids import DeviceId
from confidantd.jobs.authority import HEAVY, HEAVY_ALLOWANCE, RIGHTS, Authority, Right
from confidantd.jobs.grants import Grants
from confidantd.swarm.conflict import CONFLICT_TOPIC
from confidantd.swarm.membership import BEAT_TOPIC, BYE_TOPIC
from confidantd.swarm.reach import DIAL_BACK
from confidantd.swarm.roster import ROSTER_TOPIC
from tests.unit.test_grants import BOSS, OFFER, OTHER, OWNER, granted

PACKAGE = Path(__file__).resolve().parents[2] / "confidantd"
ME = DeviceId("me")
SWARM = {
    "BEAT_TOPIC": BEAT_TOPIC, "BYE_TOPIC": BYE_TOPIC, "CONFLICT_TOPIC": CONFLICT_TOPIC,
    "ROSTER_TOPIC": ROSTER_TOPIC, "DIAL_BACK": DIAL_BACK,
}  # fmt: skip


def registered(folder: str) -> Iterator[str]:
    """What the code of a package answers or hears."""
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="on_request" | "on_notify"), args=[name, *_]):
                    if folder == "jobs" and isinstance(name, ast.Name):
                        continue  # it passes on what others register
                    yield name.value if isinstance(name, ast.Constant) else SWARM[ast.unparse(name)]


def test_the_table_has_all_that_is_answered_and_nothing_else() -> None:
    assert sorted((*registered("jobs"), *registered("swarm"))) == sorted(RIGHTS)
    assert RIGHTS.keys() >= HEAVY


def test_what_nobody_decides_nobody_may() -> None:
    authority = Authority(ME)
    for method, right in RIGHTS.items():
        if right is Right.MEMBER:
            authority.check(OTHER, method, {})
        else:
            with pytest.raises(NotAllowedError, match=right.value):
                authority.check(OTHER, method, {})
    with pytest.raises(KeyError):
        authority.check(OTHER, "stage.steal", {})


def deciding(grants: Grants) -> Authority:
    """As a device that may hold stages decides."""
    authority = Authority(ME)
    authority.decide(Right.COORDINATOR, lambda device, _: device == BOSS)
    authority.decide(Right.OFFERER, grants.made_by)
    authority.decide(Right.OWNER, grants.owned_by)
    return authority


@pytest.mark.parametrize("method", ["stage.start", "stage.command", "stage.stop"])
def test_a_stage_obeys_its_owner(method: str) -> None:
    authority, asked = deciding(granted(OFFER)), {"job": OFFER.job, "epoch": 1, "stage": 0}
    authority.check(OWNER, method, asked)
    for other in (OTHER, BOSS):
        with pytest.raises(NotAllowedError, match="owner of the job"):
            authority.check(other, method, asked)


def test_offers_are_the_coordinator_s_and_their_withdrawal_is_his_who_made_them() -> None:
    authority, asked = deciding(granted(OFFER)), {"job": OFFER.job, "epoch": 1}
    authority.check(BOSS, "stage.offer", asked)
    authority.check(BOSS, "stage.withdraw", asked)
    for method in ("stage.offer", "stage.withdraw"):
        with pytest.raises(NotAllowedError):
            authority.check(OWNER, method, asked)


def test_a_job_with_a_hostile_name_belongs_to_nobody() -> None:
    grants = granted(OFFER, replace(OFFER, stage=1))
    for job in (None, 3, ["x"], {"y": 1}):
        assert grants.owned_by(OTHER, {"job": job})  # there is no such job: nothing to be had


def test_who_asks_for_much_waits() -> None:
    now = 0.0
    authority = Authority(ME, lambda: now)
    per_second, at_once = HEAVY_ALLOWANCE
    for _ in range(int(at_once)):
        authority.check(OTHER, "job.plan", {})
    with pytest.raises(NotAllowedError, match="too much at once"):
        authority.check(OTHER, "device.measure", {})
    authority.check(OWNER, "job.plan", {})  # others do not wait for it
    for _ in range(2 * int(at_once)):
        authority.check(ME, "job.plan", {})
        authority.check(OTHER, "swarm.beat", {})
    now = 1 / per_second
    authority.check(OTHER, "job.plan", {})
