"""Whether a device takes work for others now, from its owner's policy and its sensors. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from confidantd.config import DaemonConfig, WhenInUse

COOLER_CELSIUS = 3.0  # a device that was too hot must cool so far first, or it would flap
# Of all cores, smoothed over half a minute. A video in a browser takes a tenth of a laptop, a
# call or a game a third and more.
IN_USE_SHARE = 0.25
UNUSED_SHARE = 0.15  # then it counts as unused again


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner of a device wants; the names are those of the settings.

    Unknown readings are no reason to refuse, but for `only_when_charging` on a phone: there
    the owner asked for a certainty.
    """

    least_battery_percent: float = 20.0
    only_when_charging: bool = False
    most_celsius: float | None = None
    most_battery_celsius: float = 45.0
    when_in_use: WhenInUse = "share"

    @classmethod
    def of(cls, config: DaemonConfig) -> Policy:
        """The policy among the settings of a daemon."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Readings:
    """The state of a device; None where it is unknown, or there is no such thing.

    `others_share` is what programs that are not ours use of all cores. `phone`: there must be
    a battery, known or not.
    """

    charging: bool | None = None
    battery_percent: float | None = None
    celsius: float | None = None
    battery_celsius: float | None = None
    others_share: float | None = None
    phone: bool = False


def refusal(policy: Policy, now: Readings, *, refusing: bool) -> str:
    """Why the device takes no work, with the setting that says so; empty if it does.

    `refusing`: it did until now, so heat and use must be clearly over.
    """
    return (
        _power(policy, now)
        or _too_hot("it", "most_celsius", policy.most_celsius, now.celsius, refusing)
        or _too_hot(
            "its battery", "most_battery_celsius", policy.most_battery_celsius,
            now.battery_celsius, refusing,
        )
        or _in_use(policy, now, refusing)
    )  # fmt: skip


def _power(policy: Policy, now: Readings) -> str:
    if policy.only_when_charging and now.charging is False:
        return "it does not charge (only_when_charging)"
    if policy.only_when_charging and now.charging is None and now.phone:
        return "it is not known whether it charges (only_when_charging)"
    percent = now.battery_percent
    if now.charging or percent is None or percent >= policy.least_battery_percent:
        return ""
    least = policy.least_battery_percent
    return f"its battery is at {percent:.0f} % (least_battery_percent = {least:g})"


def _too_hot(
    what: str, setting: str, most: float | None, celsius: float | None, refusing: bool
) -> str:
    if most is None or celsius is None:
        return ""
    if celsius <= most - (COOLER_CELSIUS if refusing else 0.0):
        return ""
    return f"{what} is at {celsius:.0f} °C ({setting} = {most:g})"


def _in_use(policy: Policy, now: Readings, refusing: bool) -> str:
    if policy.when_in_use == "share" or now.others_share is None:
        return ""
    if now.others_share <= (UNUSED_SHARE if refusing else IN_USE_SHARE):
        return ""
    return f"other programs use {100 * now.others_share:.0f} % of it (when_in_use = decline)"
