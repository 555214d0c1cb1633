"""Lines of `confidant doctor` about what devices measured and what they are ready for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from confidantd.swarm.state import PeerView
from confidantd.wire.resources import Resources

NAMED = 3  # pairs in one line


def check(name: str, state: str, message: str, hint: str = "") -> dict[str, str]:
    """One line: `state` is ok, warn, fail, or none for what is not there and need not be."""
    return {"name": name, "state": state, "message": message, "hint": hint}


def check_readiness(here: Resources | None) -> dict[str, str]:
    """Whether this device takes work for others, with its charge and temperature."""
    state = _condition(here) if here is not None else ""
    if here is not None and here.refuses:
        said = "; ".join(filter(None, [f"this device takes none: {here.refuses}", state]))
        hint = "its own jobs run anyway; the setting in brackets goes into config.toml in its home"
        return check("work for others", "warn", said, hint)
    said = "; ".join(filter(None, ["this device takes it", state]))
    return check("work for others", "ok", said)


def _condition(here: Resources) -> str:
    """What is known of charge and heat, in words."""
    parts = []
    if here.battery_percent is not None:
        how = "charging" if here.charging else "not charging"
        parts.append(f"battery at {here.battery_percent:.0f} %, {how}")
    if here.temperature_celsius is not None:
        parts.append(f"{here.temperature_celsius:.0f} °C")
    return ", ".join(parts)


def check_links(alive: Sequence[PeerView]) -> list[dict[str, str]]:
    """The slowest link between any two devices that are alive, and pairs without a value."""
    rates = {(a.name, b.name): _mbps(a, b) for a, b in itertools.combinations(alive, 2)}
    if not rates:
        return []
    known = {pair: mbps for pair, mbps in rates.items() if mbps is not None}
    unknown = [f"{a} and {b}" for (a, b), mbps in rates.items() if mbps is None]
    said = "none is measured yet"
    if known:
        (a, b), mbps = min(known.items(), key=lambda found: found[1])
        said = f"the slowest is between {a} and {b}: {mbps:.3g} Mbit/s"
    if not unknown:
        return [check("links", "ok", said)]
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    if known:
        said += f"; not measured yet: {', '.join(unknown[:NAMED])}{more}"
    hint = "a link is measured in the first minute after two devices met, when both are idle"
    return [check("links", "warn", said, hint)]


def _mbps(a: PeerView, b: PeerView) -> float | None:
    """As the planner sees a pair: the slower direction of those that were measured."""
    seen = [one.links[other.id].mbps for one, other in ((a, b), (b, a)) if other.id in one.links]
    return min((mbps for mbps in seen if mbps is not None), default=None)
