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
        self._seen: dict[DeviceId, dict[str, str]] = {}  # instance -> address, the latest last

    def twin(self, device: DeviceId, instance: str, address: str) -> str | None:
        """Note an instance of a device and where it is. If a younger one had replaced it
        already, both run at once: gives the address of that one."""
        seen = self._seen.setdefault(device, {})
        latest = next(reversed(seen), instance)
        returning = instance in seen and latest != instance
        other = seen[latest] if returning else None
        seen.pop(instance, None)
        seen[instance] = address
        while len(seen) > MAX_INSTANCES:
            seen.pop(next(iter(seen)))
        return other
