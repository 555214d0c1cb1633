"""Pure decisions about several connections, and several instances, of one device."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId

MAX_INSTANCES = 32  # per device; a restart every few minutes for a day stays harmless


@dataclass(frozen=True, slots=True)
class Origin:
    """Who dialled a connection, as which attempt, and which run of the peer's daemon it joins."""

    dialer: DeviceId
    attempt: int
    instance: str


def replaces(old: Origin, new: Origin) -> bool:
    """True if `new` is kept of two connections of one pair. Both sides decide alike.

    A restarted peer wins over its former self; else the one dialled by the smaller id,
    else the later attempt of the same dialler.
    """
    if old.instance != new.instance:
        return True
    if old.dialer == new.dialer:
        return new.attempt > old.attempt
    return new.dialer < old.dialer


class InstanceLog:
    """Tells a copied home from a restart: a restarted daemon never uses an old instance again."""

    def __init__(self) -> None:
        self._seen: dict[DeviceId, list[str]] = {}

    def is_twin(self, device: DeviceId, instance: str) -> bool:
        """Note an instance of a device; True if a younger one had replaced it already."""
        seen = self._seen.setdefault(device, [])
        if seen and seen[-1] == instance:
            return False
        returning = instance in seen
        if returning:
            seen.remove(instance)
        seen.append(instance)
        del seen[:-MAX_INSTANCES]
        return returning
