"""Power, heat and use of this device at this moment, and whether it takes work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from confidantd.profile.battery import Battery
from confidantd.profile.policy import Policy, Readings, refusal
from confidantd.profile.temperature import hottest
from confidantd.profile.use import UseMeter, busy_seconds, own_seconds

ON_PHONE = sys.platform == "android"


@dataclass(frozen=True, slots=True)
class Condition:
    """Battery, the hottest of processor and battery, and why it takes no work (empty: it does)."""

    battery: Battery = field(default_factory=Battery)
    celsius: float | None = None
    refuses: str = ""


class Readiness:
    """Reads the sensors by the policy of this device. Never waits; any thread may look."""

    def __init__(self, policy: Policy, read_battery: Callable[[], Battery]) -> None:
        self._policy = policy
        self._read_battery = read_battery
        self._use = UseMeter(busy_seconds, own_seconds)
        self._refuses = ""
        self._looking = threading.Lock()  # an offer and the regular look may come together

    def look(self) -> Condition:
        """What is so now."""
        with self._looking:
            battery = self._read_battery()
            processor, cells = hottest()
            cells = _highest(cells, battery.celsius)
            celsius = _highest(processor, cells)
            watched = self._policy.when_in_use == "decline"  # else it is not worth the time
            now = Readings(
                charging=battery.charging,
                battery_percent=battery.percent,
                celsius=celsius,
                battery_celsius=cells,
                others_share=self._use.latest() if watched else None,
                phone=ON_PHONE,
            )
            self._refuses = refusal(self._policy, now, refusing=bool(self._refuses))
            return Condition(battery, celsius, self._refuses)


def _highest(*found: float | None) -> float | None:
    return max((value for value in found if value is not None), default=None)
