"""Devices that talk nonsense are not talked to for a while, each time for longer; pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from confidantd.ids import DeviceId

FIRST_SECONDS, MOST_SECONDS = 2.0, 60.0
FORGIVEN_SECONDS = 300.0  # after so long without another offence it begins anew
REMEMBERED = 512


@dataclass(slots=True)
class _Offence:
    until: float
    seconds: float


class Shunning:
    """Who is shunned, and until when; `now` in seconds of any steady clock."""

    def __init__(self) -> None:
        self._offences: OrderedDict[DeviceId, _Offence] = OrderedDict()

    def offended(self, device: DeviceId, now: float) -> None:
        """It broke the rules of the conversation."""
        last = self._offences.pop(device, None)
        seconds = FIRST_SECONDS
        if last is not None and now < last.until + FORGIVEN_SECONDS:
            seconds = min(2 * last.seconds, MOST_SECONDS)
        self._offences[device] = _Offence(now + seconds, seconds)
        while len(self._offences) > REMEMBERED:
            self._offences.popitem(last=False)

    def left(self, device: DeviceId, now: float) -> float:
        """Seconds until it is talked to again."""
        offence = self._offences.get(device)
        return 0.0 if offence is None else max(0.0, offence.until - now)
