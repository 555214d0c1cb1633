"""Which failures a job survives, and which devices are to blame for them; pure."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.ids import DeviceId

# What a stage that failed on its own says; a lost link is a symptom of something else.
OWN_FAULTS = frozenset(
    ("does-not-fit", "worker-failed", "backend-failed", "storage", "missing-tensor", "internal")
)
# Those that another try on the same device does not mend.
LASTING = frozenset(("does-not-fit", "storage"))
# What may be over a moment later: a device went, or the swarm has just learned of one.
PASSING = frozenset(("peer-lost", "peer-refused", "stale-epoch", "no-coordinator"))
# What another epoch may mend. Anything else is the user's own trouble.
CURABLE = OWN_FAULTS | PASSING | {
    "protocol", "not-allowed", "declined", "bad-device", "corrupt-file",
}  # fmt: skip
MOST_OF_A_DEVICE = 2  # a worker may be killed once, for whatever reason, and start again
FORGIVEN_STEPS = 100  # after so many more it begins anew


@dataclass(slots=True)
class _Fault:
    count: int
    step: int


class Faults:
    """How often the stages of each device have failed on their own."""

    def __init__(self) -> None:
        self._of: dict[DeviceId, _Fault] = {}

    def again(self, device: DeviceId, code: str, step: int) -> bool:
        """Count one more, at a step; whether the device should hold no stage any more."""
        last = self._of.get(device)
        count = 1 if last is None or step - last.step >= FORGIVEN_STEPS else last.count + 1
        self._of[device] = _Fault(count, step)
        return code in LASTING or count >= MOST_OF_A_DEVICE
