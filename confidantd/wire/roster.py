"""Who belongs to a swarm, as members tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId

MAX_ENTRIES = 512
MAX_CHANGE = 2**31


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """Where a device stands: after an odd `change` it is a member, after an even one removed.

    Every invitation and every removal is one more change, and the highest one is right,
    whoever tells it. So a device that was removed stays so until it is invited again,
    also where a member who was away still has it on its list.
    """

    device: DeviceId
    change: int
    certificate: str = ""  # PEM of a member

    @property
    def member(self) -> bool:
        """Whether it belongs to the swarm."""
        return self.change % 2 == 1


@dataclass(frozen=True, slots=True)
class Roster:
    """All that one member knows."""

    entries: tuple[RosterEntry, ...]
