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
# A claim that only others pass on holds so long after its last pulse. Every hop samples pulses
# once a second: in simulations they came up to 4.0 s apart over 6 hops, 5.0 s over 15. A new term
# travels faster than pulses: a dozen hops away, a device may be without a claim for a moment.
LEASE_SECONDS = 6.0
# What was heard of a coordinator is kept so long after the last peer named it: much longer than
# a claim whose coordinator is gone can wander (a lease per device that has not heard it yet).
MEMORY_SECONDS = 60.0
# A claim counts as followed so long after its last follower: if that changed with every
# heartbeat, two coordinators would rank differently here and there, and give way to each other.
FOLLOWED_SECONDS = 10.0


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
    """The latest claim heard of a coordinator, when it came, and when a peer last named it.

    Only this claim is passed on: an older one is never followed again, nor held for new.
    """

    claim: Claim
    at: float
    named_at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """A device's part in the election: `term` never decreases; `claim` is None while vacant."""

    term: int = 0
    claim: Claim | None = None
    vacant_since: float | None = None
    followed_at: float = -math.inf  # a peer followed the claim, if it is our own
    direct: frozenset[DeviceId] = frozenset()
    pulses: Mapping[DeviceId, Pulse] = field(default_factory=dict)


def decide(standing: Standing, scene: Scene, now: float) -> Standing:
    """The next standing; called on every change and every fraction of a second."""
    pulses = _pulses(standing, scene, now)
    term = max([standing.term, *(w.term for w in scene.alive.values()), *_claimed_terms(scene)])
    followed_at = _followed_at(standing, scene, now)
    claims = [
        *_own_claim(standing, scene, now - followed_at < FOLLOWED_SECONDS),
        *_valid_claims(standing, scene, pulses, now),
    ]
    direct = frozenset(scene.alive) | scene.suspect
    base = replace(standing, term=term, direct=direct, pulses=pulses, followed_at=followed_at)
    if not claims:
        return _vacant(base, scene, now)
    best = max(claims, key=_order)
    if best.coordinator == scene.me and term > best.term:
        best = replace(best, term=term + 1)  # our word must count for those who saw that term
    return replace(base, term=max(term, best.term), claim=best, vacant_since=None)


def _order(claim: Claim) -> tuple[bool, int, Rank, DeviceId]:
    """The better claim is greater: an incumbent that is followed, a newer term, a better rank."""
    return claim.followed, claim.term, claim.rank, claim.coordinator


def _followed_at(standing: Standing, scene: Scene, now: float) -> float:
    if standing.claim is None or standing.claim.coordinator != scene.me:
        return -math.inf
    return now if any(_follows(w, scene.me) for w in scene.alive.values()) else standing.followed_at


def _follows(word: Word, device: DeviceId) -> bool:
    return word.claim is not None and word.claim.coordinator == device


def _own_claim(standing: Standing, scene: Scene, followed: bool) -> Iterable[Claim]:
    claim = standing.claim
    if claim is not None and claim.coordinator == scene.me:
        yield replace(claim, pulse=scene.pulse, followed=followed, rank=scene.rank)


def _valid_claims(
    standing: Standing, scene: Scene, pulses: Mapping[DeviceId, Pulse], now: float
) -> Iterable[Claim]:
    """Claims of others that hold now: one's own word, or passed on and known to be fresh."""
    kept = standing.claim
    if kept is not None and kept.coordinator not in {scene.me, *scene.alive}:
        known = pulses.get(kept.coordinator, Pulse(kept, -math.inf, now))
        if kept.coordinator in scene.suspect or now - known.at < LEASE_SECONDS:
            yield known.claim  # suspect, or passed over for a moment: no election yet
    for speaker, word in scene.alive.items():
        claim = word.claim
        if claim is None or claim.coordinator == scene.me:
            continue
        known = pulses[claim.coordinator]
        if claim.coordinator in scene.alive:
            if claim.coordinator == speaker:
                yield claim
        elif claim.coordinator in word.heard or now - known.at < LEASE_SECONDS:
            yield known.claim


def _pulses(standing: Standing, scene: Scene, now: float) -> dict[DeviceId, Pulse]:
    """The newest claim of every coordinator named lately; one that we just lost ourselves
    counts as silent until others bring a newer pulse of it."""
    pulses = {d: p for d, p in standing.pulses.items() if now - p.named_at < MEMORY_SECONDS}
    for claim in _claims(scene):
        known = pulses.get(claim.coordinator)
        if known is None or _age(claim) > _age(known.claim):
            known = Pulse(claim, now, now)
        pulses[claim.coordinator] = replace(known, named_at=now)
    lost = standing.direct - scene.alive.keys() - scene.suspect
    return {d: replace(p, at=-math.inf) if d in lost else p for d, p in pulses.items()}


def _age(claim: Claim) -> tuple[int, int]:
    """Of two claims of one coordinator the later one is greater."""
    return claim.term, claim.pulse


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
