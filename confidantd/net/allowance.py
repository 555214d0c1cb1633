"""How much of something may happen in a time: a token bucket; pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class Allowance:
    """`burst` at once, and `per_second` in the long run. `now` in seconds of any steady clock."""

    per_second: float
    burst: float
    left: float = 0.0
    at: float = float("-inf")

    def take(self, now: float) -> bool:
        """Take one, if there is one."""
        self._fill(now)
        if self.left < 1:
            return False
        self.left -= 1
        return True

    def spend(self, amount: float, now: float) -> float:
        """Take so much in any case; how many seconds to wait for it."""
        self._fill(now)
        self.left -= amount
        return max(0.0, -self.left / self.per_second)

    def _fill(self, now: float) -> None:
        self.left = min(self.burst, self.left + (now - self.at) * self.per_second)
        self.at = now


class Allowances:
    """One for each of many, of which those that were used last are remembered."""

    def __init__(self, per_second: float, burst: float, remembered: int) -> None:
        self._per_second, self._burst, self._remembered = per_second, burst, remembered
        self._of: OrderedDict[str, Allowance] = OrderedDict()

    def take(self, whose: str, now: float) -> bool:
        """Take one of `whose`, if there is one."""
        return self.of(whose).take(now)

    def of(self, whose: str) -> Allowance:
        """That of `whose`."""
        found = self._of.get(whose)
        if found is None:
            found = self._of[whose] = Allowance(self._per_second, self._burst)
            while len(self._of) > self._remembered:
                self._of.popitem(last=False)
        self._of.move_to_end(whose)
        return found
