"""What the swarm shows of its devices, and of who coordinates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from confidantd.ids import DeviceId
from confidantd.wire.links import Link
from confidantd.wire.resources import Resources

PeerState = Literal["alive", "suspect", "gone", "unpaired"]

TAG_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class PeerView:
    """One device as this one sees it. `address` is `host:port` or empty; times are smoothed.

    `bandwidth_mbps` is that of the link between the two, `links` are what the device itself
    measured of its own.
    """

    id: DeviceId
    name: str
    state: PeerState
    address: str
    round_trip_ms: float | None
    resources: Resources | None
    is_self: bool
    bandwidth_mbps: float | None = None
    links: Mapping[DeviceId, Link] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CoordinatorView:
    """The coordinator that this device follows, and the term of its claim."""

    id: DeviceId
    name: str
    term: int


def swarm_tag(devices: Iterable[DeviceId]) -> str:
    """A short name for a set of paired devices: equal where the same devices are paired."""
    return hashlib.sha256("\n".join(sorted(devices)).encode()).hexdigest()[:TAG_CHARACTERS]
