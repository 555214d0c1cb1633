"""Which devices lose their stage for what fails there."""

from __future__ import annotations

import pytest

from confidantd.ids import DeviceId
from confidantd.jobs.faults import CURABLE, FORGIVEN_STEPS, LASTING, OWN_FAULTS, Faults

A, B = DeviceId("a" * 64), DeviceId("b" * 64)


def test_a_worker_may_be_killed_once() -> None:
    faults = Faults()
    assert not faults.again(A, "worker-failed", 10)
    assert not faults.again(B, "worker-failed", 11), "another device"
    assert faults.again(A, "worker-failed", 12)


def test_it_is_forgiven_after_many_steps() -> None:
    faults = Faults()
    assert not faults.again(A, "backend-failed", 10)
    assert not faults.again(A, "backend-failed", 10 + FORGIVEN_STEPS)
    assert faults.again(A, "backend-failed", 11 + FORGIVEN_STEPS)


@pytest.mark.parametrize("code", sorted(LASTING))
def test_what_another_try_does_not_mend(code: str) -> None:
    assert Faults().again(A, code, 0)


def test_the_users_own_trouble_is_not_cured() -> None:
    assert LASTING < OWN_FAULTS < CURABLE
    assert not CURABLE & {"bad-option", "bad-model", "bad-data", "bad-output", "cancelled"}
