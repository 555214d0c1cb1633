"""Who coordinates: one pure function from what is heard to what to claim or follow.

Availability first: every connected group has a coordinator within seconds, also where not
everyone hears everyone, because followers pass the coordinator's claim on. Two sides of a
split may each have one; once they hear each other exactly one remains, since all compare
the same claims in the same order. Terms only grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from confidantd.ids import DeviceId
from confidantd.wire.messages import Claim, Rank

ALONE_SECONDS = 2.0  # a device without peers waits so long: at a start, peers turn up meanwhile
PATIENCE_SECONDS = 3.0  # for a better placed peer that should claim and does not
LEASE_SECONDS = 4.0  # a claim that only others pass on holds so long after its last pulse


@dataclass(frozen=True, slots=True)
class Word:
    """The last heartbeat of a peer, as far as elections go."""

    term: int
    claim: Claim | None
    heard: frozenset[DeviceId]
    rank: Rank


@dataclass(frozen=True, slots=True)
class Scene:
    """What a device knows at one moment. `pulse` counts its own heartbeats.

    `alive` are the peers it hears; `suspect` those whose silence is not decided yet.
    """

    me: DeviceId
    rank: Rank
    pulse: int
    alive: Mapping[DeviceId, Word]
    suspect: frozenset[DeviceId] = frozenset()


@dataclass(frozen=True, slots=True)
class Pulse:
    """The latest sign of life of a coordinator, and when it came here."""

    term: int
    pulse: int
    at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """A device's part in the election: `term` never decreases; `claim` is None while vacant."""

    term: int = 0
    claim: Claim | None = None
    vacant_since: float | None = None
    direct: frozenset[DeviceId] = frozenset()
    pulses: Mapping[DeviceId, Pulse] = field(default_factory=dict)


def decide(standing: Standing, scene: Scene, now: float) -> Standing:
    """The next standing; called on every change and every fraction of a second."""
    pulses = _pulses(standing, scene, now)
    term = max([standing.term, *(w.term for w in scene.alive.values()), *_claimed_terms(scene)])
    claims = [*_own_claim(standing, scene), *_valid_claims(standing, scene, pulses, now)]
    direct = frozenset(scene.alive) | scene.suspect
    base = replace(standing, term=term, direct=direct, pulses=pulses)
    if not claims:
        return _vacant(base, scene, now)
    best = max(claims, key=_order)
    if best.coordinator == scene.me and term > best.term:
        best = replace(best, term=term + 1)  # our word must count for those who saw that term
    return replace(base, term=max(term, best.term), claim=best, vacant_since=None)


def _order(claim: Claim) -> tuple[bool, int, Rank, DeviceId]:
    """The better claim is greater: an incumbent that is followed, a newer term, a better rank."""
    return claim.followed, claim.term, claim.rank, claim.coordinator


def _own_claim(standing: Standing, scene: Scene) -> Iterable[Claim]:
    claim = standing.claim
    if claim is not None and claim.coordinator == scene.me:
        followed = any(_follows(word, scene.me) for word in scene.alive.values())
        yield replace(claim, pulse=scene.pulse, followed=followed, rank=scene.rank)


def _follows(word: Word, device: DeviceId) -> bool:
    return word.claim is not None and word.claim.coordinator == device


def _valid_claims(
    standing: Standing, scene: Scene, pulses: Mapping[DeviceId, Pulse], now: float
) -> Iterable[Claim]:
    """Claims of others that hold now: one's own word, or passed on and known to be fresh."""
    kept = standing.claim
    if kept is not None and kept.coordinator in scene.suspect:
        yield kept  # it may be back in a moment: no election yet
    for speaker, word in scene.alive.items():
        claim = word.claim
        if claim is None or claim.coordinator == scene.me:
            continue
        if claim.coordinator in scene.alive:
            if claim.coordinator == speaker:
                yield claim
        elif claim.coordinator in word.heard or _fresh(claim, pulses, now):
            yield claim


def _fresh(claim: Claim, pulses: Mapping[DeviceId, Pulse], now: float) -> bool:
    known = pulses.get(claim.coordinator)
    return known is not None and now - known.at < LEASE_SECONDS


def _pulses(standing: Standing, scene: Scene, now: float) -> dict[DeviceId, Pulse]:
    """Signs of life of every coordinator that is claimed; one that we just lost ourselves
    counts as silent until others bring a newer pulse of it."""
    pulses: dict[DeviceId, Pulse] = {}
    lost = standing.direct - scene.alive.keys() - scene.suspect
    for claim in _claims(scene):
        device = claim.coordinator
        known = pulses.get(device) or standing.pulses.get(device)
        if known is None or (claim.term, claim.pulse) > (known.term, known.pulse):
            known = Pulse(claim.term, claim.pulse, now)
        pulses[device] = known
    return {d: replace(p, at=-math.inf) if d in lost else p for d, p in pulses.items()}


def _claims(scene: Scene) -> list[Claim]:
    return [word.claim for word in scene.alive.values() if word.claim is not None]


def _claimed_terms(scene: Scene) -> list[int]:
    return [claim.term for claim in _claims(scene)]


def _vacant(standing: Standing, scene: Scene, now: float) -> Standing:
    """Claim if it is ours to claim now, else wait."""
    since = now if standing.vacant_since is None else standing.vacant_since
    if not scene.alive:
        due = now - since >= ALONE_SECONDS
    else:
        best = max((word.rank, device) for device, word in scene.alive.items())
        due = (scene.rank, scene.me) > best or now - since >= PATIENCE_SECONDS
    if not due:
        return replace(standing, claim=None, vacant_since=since)
    term = standing.term + 1
    claim = Claim(scene.me, term, scene.pulse, False, scene.rank)
    return replace(standing, term=term, claim=claim, vacant_since=None)
