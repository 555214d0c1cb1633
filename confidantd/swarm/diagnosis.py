"""Why devices do not see each other, and what to do: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MOST_SKEW_SECONDS = 60.0
NAMED = 3  # devices in one line

Dialled = Literal["ok", "refused", "silent", "no-route"]  # what came of a TCP connection
Mdns = Literal["running", "off", "failed"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a connected device found when it was asked to dial this one back.

    `dialled`: by this device's addresses; `hears`: whether it hears this one's announcements;
    `skew`: seconds its clock is ahead of this one's.
    """

    dialled: Mapping[str, Dialled]
    hears: bool
    skew: float


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A member. `announced`: it is heard by mDNS, as which protocol; None: it is not.

    `failures`: by address, the code and the sentence of the last attempt there.
    """

    name: str
    connected: bool
    announced: str | None = None
    failures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What this device knows of its network. `addresses`: own ones by interface; `unpaired`:
    names of strangers that announce themselves, with their protocol; `typed`: failures at
    addresses that a person gave.
    """

    protocol: str
    port: int
    mdns: Mdns
    mdns_problem: str
    addresses: Mapping[str, str]
    neighbours: Sequence[Neighbour]
    unpaired: Sequence[tuple[str, str]] = ()
    typed: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `state` is ok, warn or fail."""

    name: str
    state: Literal["ok", "warn", "fail"]
    message: str
    hint: str = ""


def findings(facts: Facts) -> Iterator[Finding]:
    """From the ground up: interfaces, multicast, connections in and out, releases, clocks."""
    yield _interfaces(facts)
    yield _multicast(facts)
    yield from _incoming(facts)
    for neighbour in facts.neighbours:
        if not neighbour.connected:
            yield _unreached(facts, neighbour)
    for address, (code, sentence) in facts.typed.items():
        yield _typed(address, code, sentence)
    yield from _clocks(facts)
    yield from _strangers(facts)


def _interfaces(facts: Facts) -> Finding:
    listed = ", ".join(f"{address} ({name})" for address, name in facts.addresses.items())
    if not listed:
        return Finding(
            "network", "fail", "no network interface of this device is up",
            "connect it to the Wi-Fi of the other devices",
        )  # fmt: skip
    if all(address.startswith("127.") for address in facts.addresses):
        return Finding(
            "network", "warn", f"only this machine itself is reached: {listed}",
            "connect it to a network, or let --host name an address of one",
        )  # fmt: skip
    return Finding("network", "ok", f"others reach this device at {listed}, port {facts.port}")


def _multicast(facts: Facts) -> Finding:
    by_address = "devices still meet by address: --peer HOST:PORT, or join CODE --at HOST:PORT"
    if facts.mdns == "off":
        return Finding("multicast", "warn", "mDNS is off (--no-mdns)", by_address)
    if facts.mdns == "failed":
        return Finding("multicast", "fail", f"mDNS does not work: {facts.mdns_problem}", by_address)
    connected = [n for n in facts.neighbours if n.connected]
    unheard = [n.name for n in connected if n.announced is None]
    deaf = [n.name for n in connected if n.answer is not None and not n.answer.hears]
    said = []
    if unheard:
        said.append(f"no announcement of {_some(unheard)} arrives here")
    if deaf:
        said.append(f"none of this device arrives at {_some(deaf)}")
    if said:
        return Finding(
            "multicast", "warn", f"{', and '.join(said)}, though they are connected: multicast is "
            "filtered on the way",
            "turn off client (AP) isolation and multicast filters in the access point, and allow "
            f"UDP port 5353 in firewalls; {by_address}",
        )  # fmt: skip
    heard = [n.name for n in facts.neighbours if n.announced is not None]
    heard += [name for name, _ in facts.unpaired]
    if heard:
        return Finding("multicast", "ok", f"announcements of {_some(heard)} arrive")
    if not facts.neighbours:
        return Finding("multicast", "ok", "no other device announces itself here")
    return Finding(
        "multicast", "warn", "no device is heard",
        "they are off, on another network, or multicast is filtered (client isolation of the "
        f"access point, a firewall on UDP port 5353): {by_address}",
    )  # fmt: skip


def _incoming(facts: Facts) -> Iterator[Finding]:
    """Whether others can open a connection to this device, as they found themselves."""
    answers = [(n.name, n.answer) for n in facts.neighbours if n.answer is not None]
    if not answers:
        return
    reached: set[str] = set()
    failed: dict[str, tuple[str, Dialled]] = {}
    for name, answer in answers:
        for address, outcome in answer.dialled.items():
            if outcome == "ok":
                reached.add(address)
            else:
                failed.setdefault(address, (name, outcome))
    if not reached and failed:
        name, outcome = next(iter(failed.values()))
        yield Finding(
            "incoming", "fail",
            f"{name} cannot connect to this device ({_outcome(outcome)} at {', '.join(failed)})",
            f"allow TCP port {facts.port} in this device's firewall: ufw allow {facts.port}/tcp",
        )  # fmt: skip
        return
    useless = {a: found for a, found in failed.items() if a not in reached}
    if not useless:
        yield Finding("incoming", "ok", f"{_some([name for name, _ in answers])} can connect back")
    for address, (name, outcome) in useless.items():
        host = address.rpartition(":")[0]
        interface = facts.addresses.get(host, "an interface")
        good = ", ".join(sorted(a.rpartition(":")[0] for a in reached))
        yield Finding(
            "incoming", "warn",
            f"{name} cannot reach this device at {address} ({interface}: {_outcome(outcome)}), but "
            f"at {good}",
            f"harmless; --host {good.partition(',')[0]} leaves the other network out",
        )  # fmt: skip


def _unreached(facts: Facts, there: Neighbour) -> Finding:
    """Why a member is not connected, by what was tried and by what is heard of it."""
    codes = {code for code, _ in there.failures.values()}
    if "protocol" in codes or there.announced not in (None, facts.protocol):
        return _other_release(facts, there)
    name, where = there.name, ", ".join(there.failures) or "no address"
    state: Literal["warn", "fail"] = "fail"
    if "not-paired" in codes:
        message = f"{name} answers, but does not trust this device any more"
        hint = (
            "if this device was removed: confidant leave here, then confidant invite there and "
            f"confidant join CODE here; if {name} is the one that was: the same on {name}"
        )
    elif "unexpected-device" in codes:
        message = f"another device than {name} answers at {where}"
        hint = f"give the address that {name} has now: --peer HOST:PORT; or wait until it is heard"
    elif there.announced is not None:
        message = f"{name} announces itself, but no connection to it opens ({where})"
        hint = (
            f"a firewall on {name} blocks TCP, or the access point lets devices be seen but not "
            f"talk (client isolation): allow confidantd's port on {name}"
        )
    elif codes and codes <= {"peer-refused"}:
        state, message = "warn", f"nothing listens at {where}"
        hint = f"start confidantd on {name}; if it runs, it has another address: --peer HOST:PORT"
    elif codes:
        state, message = "warn", f"{name} does not answer at {where} and is not heard"
        hint = (
            "it is off, on another network, or multicast and TCP are both blocked: start "
            f"confidantd on {name}, or give its address of now: --peer HOST:PORT"
        )
    else:
        state, message = "warn", f"no address of {name} is known, and it is not heard"
        hint = f"start confidantd on {name}, or give its address: --peer HOST:PORT"
    return Finding(f"peer {name}", state, message, hint)


def _other_release(facts: Facts, there: Neighbour) -> Finding:
    said = next((s for code, s in there.failures.values() if code == "protocol"), "")
    said = said or f"{there.name} speaks protocol {there.announced}, this device {facts.protocol}"
    hint = "install the same release of confidantd on both"
    return Finding(f"peer {there.name}", "fail", said, hint)


def _typed(address: str, code: str, sentence: str) -> Finding:
    hints = {
        "peer-refused": "start confidantd there; the port is in its `confidant status`",
        "not-paired": "confidant invite here, and confidant join CODE there",
        "protocol": "install the same release of confidantd on both",
    }
    unknown = "check the address, that both are on one network, and firewalls between them"
    return Finding(f"--peer {address}", "warn", sentence, hints.get(code, unknown))


def _clocks(facts: Facts) -> Iterator[Finding]:
    for there in facts.neighbours:
        skew = 0.0 if there.answer is None else there.answer.skew
        if abs(skew) > MOST_SKEW_SECONDS:
            way = "ahead of" if skew > 0 else "behind"
            yield Finding(
                "clock", "warn", f"the clock of {there.name} is {abs(skew):.0f} s {way} this one's",
                "connections work all the same, but logs and records do not fit: set the time",
            )  # fmt: skip


def _strangers(facts: Facts) -> Iterator[Finding]:
    other = [name for name, protocol in facts.unpaired if protocol != facts.protocol]
    if other:
        yield Finding(
            "release", "warn", f"{_some(other)} on this network has another release of confidantd",
            "install the same release on all devices",
        )  # fmt: skip
    same = [name for name, protocol in facts.unpaired if protocol == facts.protocol]
    if same:
        yield Finding(
            "unpaired", "ok", f"{_some(same)} is on this network and not paired with this device",
            "confidant invite here, and confidant join CODE there, if it is yours",
        )  # fmt: skip


def _outcome(outcome: Dialled) -> str:
    return {"refused": "refused", "silent": "no answer", "no-route": "no route"}.get(outcome, "")


def _some(names: Sequence[str]) -> str:
    found = sorted(set(names))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more
