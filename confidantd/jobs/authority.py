"""Who may ask what of this device: one table, and the one place where it is enforced.

Every connection is that of a member, by its certificate; strangers get no further than the TLS
handshake. What the swarm itself says any member may say of itself; the list of members is signed
besides. Those handlers stand below this one, so for them the table only tells.
A blob may be read by a member that knows its SHA-256, which only those are told that hold a
stage of the job (or that asked for its programs): it cannot be guessed.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from typing import Any

from confidantd.errors import NotAllowedError
from confidantd.ids import DeviceId
from confidantd.net.allowance import Allowances


class Right(enum.Enum):
    """Of whom a request is taken."""

    MEMBER = "any member of the swarm"
    COORDINATOR = "the coordinator that this device follows"
    OFFERER = "the coordinator that made the offer"
    OWNER = "the owner of the job"
    HOLDER = "the device that holds the stage"


RIGHTS: Mapping[str, Right] = {
    # of the swarm
    "swarm.beat": Right.MEMBER,
    "swarm.bye": Right.MEMBER,
    "swarm.conflict": Right.MEMBER,
    "swarm.dial-back": Right.MEMBER,
    "swarm.roster": Right.MEMBER,
    # of a device
    "device.speeds": Right.MEMBER,
    "device.measure": Right.MEMBER,
    "device.link": Right.MEMBER,
    "programs.compile": Right.MEMBER,
    # of the coordinator
    "job.plan": Right.MEMBER,
    "job.negotiate": Right.MEMBER,
    # of a device that may hold a stage, or does
    "stage.backends": Right.MEMBER,
    "stage.offer": Right.COORDINATOR,
    "stage.withdraw": Right.OFFERER,
    "stage.start": Right.OWNER,
    "stage.command": Right.OWNER,
    "stage.spares": Right.OWNER,
    "stage.pulse": Right.OWNER,
    "job.running": Right.MEMBER,  # of its own jobs
    "stage.stop": Right.OWNER,
    # of the owner of a job
    "stage.event": Right.HOLDER,
    "stage.progress": Right.HOLDER,
}

# What keeps a device busy: a member that asks without end is told to wait.
HEAVY = frozenset(
    ("device.speeds", "device.measure", "device.link", "programs.compile", "job.plan",
     "job.negotiate", "stage.backends", "stage.spares")
)  # fmt: skip
HEAVY_ALLOWANCE = (5.0, 200.0)  # of one member: a second, and at once
MOST_MEMBERS = 512

Decision = Callable[[DeviceId, Mapping[str, Any]], bool]


class Authority:
    """Asks whoever knows: of each right one part of the daemon says who has it. Nobody has a
    right that no part speaks for.
    """

    def __init__(self, self_id: DeviceId, clock: Callable[[], float] = time.monotonic) -> None:
        self._self_id, self._clock = self_id, clock
        self._heavy = Allowances(*HEAVY_ALLOWANCE, remembered=MOST_MEMBERS)
        self._decisions: dict[Right, Decision] = {Right.MEMBER: lambda _device, _params: True}

    def decide(self, right: Right, decision: Decision) -> None:
        """`decision` says whether a device has the right, by what it asks."""
        self._decisions[right] = decision

    def check(self, device: DeviceId, method: str, params: Mapping[str, Any]) -> None:
        """`NotAllowedError` unless the device may ask that; KeyError for what nobody may."""
        right = RIGHTS[method]
        decision = self._decisions.get(right)
        if decision is None or not decision(device, params):
            raise NotAllowedError(f"{method} is for {right.value} only", "see `confidant peers`")
        counts = method in HEAVY and device != self._self_id
        if counts and not self._heavy.take(device, self._clock()):
            raise NotAllowedError("it asks for too much at once", "try again in a minute")
