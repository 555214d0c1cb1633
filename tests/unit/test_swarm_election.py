"""Elections: single rules, and simulated swarms with drops, partitions and kills."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import combinations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from confidantd.ids import DeviceId
from confidantd.swarm.detector import Detector
from confidantd.swarm.election import (
    FOLLOWED_SECONDS,
    LEASE_SECONDS,
    Scene,
    Standing,
    Word,
    decide,
)
from confidantd.wire.messages import Claim, Rank

A, B, C, D = (DeviceId(letter * 64) for letter in "abcd")
LAPTOP, BOARD = Rank(True, True, 16), Rank(False, True, 4)


def _claim(device: DeviceId, term: int, followed: bool = False, pulse: int = 1) -> Claim:
    return Claim(device, term, pulse, followed, BOARD)


def _word(term: int, claim: Claim | None, *heard: DeviceId, rank: Rank = BOARD) -> Word:
    return Word(term, claim, frozenset(heard), rank)


def test_a_lone_device_coordinates_after_its_grace() -> None:
    scene = Scene(A, BOARD, 1, {})
    waiting = decide(Standing(term=4), scene, 10.0)
    assert waiting.claim is None
    assert decide(waiting, scene, 11.9).claim is None
    claimed = decide(waiting, scene, 12.0)
    assert claimed.claim == Claim(A, 5, 1, False, BOARD)
    assert claimed.term == 5


def test_a_newcomer_with_a_better_rank_follows_the_incumbent() -> None:
    incumbent = _claim(B, 3, followed=True)
    scene = Scene(A, LAPTOP, 1, {B: _word(3, incumbent, C), C: _word(3, incumbent, B)})
    assert decide(Standing(), scene, 0.0).claim == incumbent


def test_a_newcomer_with_a_higher_term_gives_way_and_the_incumbent_outbids_it() -> None:
    mine = Standing(term=50, claim=_claim(A, 50))
    incumbent = _claim(B, 3, followed=True)
    given_way = decide(mine, Scene(A, LAPTOP, 1, {B: _word(3, incumbent)}), 0.0)
    assert given_way.claim == incumbent
    assert given_way.term == 50
    follower = _word(3, incumbent)
    seen = Scene(B, BOARD, 9, {A: _word(50, _claim(A, 50)), C: follower})
    outbid = decide(Standing(term=3, claim=incumbent), seen, 0.0)
    assert outbid.claim == Claim(B, 51, 9, True, BOARD)


def test_after_a_loss_the_best_ranked_claims_at_once_and_the_others_wait() -> None:
    lost = _claim(C, 7, followed=True)
    standing = Standing(term=7, claim=lost, direct=frozenset({B, C}))
    best = decide(standing, Scene(A, LAPTOP, 1, {B: _word(7, None)}), 0.0)
    assert best.claim == Claim(A, 8, 1, False, LAPTOP)
    other = decide(standing, Scene(B, BOARD, 1, {A: _word(7, None, rank=LAPTOP)}), 0.0)
    assert other.claim is None


def test_a_coordinator_that_another_peer_hears_is_not_lost() -> None:
    claim = _claim(C, 7, followed=True)
    standing = Standing(term=7, claim=claim, direct=frozenset({B, C}))
    scene = Scene(A, LAPTOP, 1, {B: _word(7, claim, A, C)})
    assert decide(standing, scene, 0.0).claim == claim


def test_a_suspect_coordinator_is_kept() -> None:
    claim = _claim(C, 7, followed=True)
    standing = Standing(term=7, claim=claim, direct=frozenset({C}))
    assert decide(standing, Scene(A, LAPTOP, 1, {}, frozenset({C})), 0.0).claim == claim


def test_a_claim_passed_on_far_away_holds_only_while_its_pulse_goes_on() -> None:
    claim = _claim(C, 7, followed=True)
    scene = Scene(A, BOARD, 1, {B: _word(7, claim, A)})  # B does not hear C itself
    standing = decide(Standing(), scene, 0.0)
    assert standing.claim == claim
    again = decide(standing, replace(scene, alive={B: _word(7, replace(claim, pulse=2))}), 3.0)
    assert again.claim is not None
    assert again.claim.pulse == 2
    stale = replace(scene, alive={B: _word(7, replace(claim, pulse=2))})
    assert decide(again, stale, 2.9 + LEASE_SECONDS).claim is not None
    assert decide(again, stale, 3.0 + LEASE_SECONDS).claim is None


def test_of_two_copies_of_a_claim_the_later_one_is_passed_on() -> None:
    old, new = (_claim(D, 7, followed=pulse == 1, pulse=pulse) for pulse in (1, 2))
    for words in ({B: _word(7, old), C: _word(7, new)}, {C: _word(7, new), B: _word(7, old)}):
        standing = decide(Standing(), Scene(A, BOARD, 1, words), 0.0)
        assert standing.claim == new
        only_old = Scene(A, BOARD, 1, {B: _word(7, old)})
        assert decide(standing, only_old, 1.0).claim == new


def test_a_silent_claim_is_not_taken_for_new_after_nobody_named_it() -> None:
    gone, mine = _claim(D, 2, followed=True), _claim(A, 3)
    named = Scene(A, BOARD, 1, {B: _word(3, gone)})
    silent = decide(decide(Standing(term=2), named, 0.0), named, LEASE_SECONDS)
    assert silent.claim is None
    follower = Scene(A, BOARD, 2, {B: _word(3, mine)})
    claimed = decide(replace(silent, term=3, claim=mine), follower, LEASE_SECONDS + 1)
    again = decide(claimed, named, LEASE_SECONDS + 2)
    assert again.claim is not None
    assert again.claim.coordinator == A


def test_a_follower_stays_when_the_peer_that_passed_the_claim_on_follows_another() -> None:
    far = _claim(C, 7, followed=True)
    standing = decide(Standing(), Scene(A, LAPTOP, 1, {B: _word(7, far, A)}), 0.0)
    crossed = Scene(A, LAPTOP, 1, {B: _word(7, _claim(A, 6), A)})
    assert decide(standing, crossed, 1.0).claim == far
    assert decide(standing, crossed, LEASE_SECONDS).claim == Claim(A, 8, 1, False, LAPTOP)


def test_a_claim_counts_as_followed_for_a_while_after_its_last_follower() -> None:
    standing = Standing(term=7, claim=_claim(A, 7))
    follower = Scene(A, BOARD, 1, {B: _word(7, _claim(A, 7))})
    followed = decide(standing, follower, 0.0)
    crossed = Scene(A, BOARD, 2, {B: _word(7, _claim(C, 6, followed=True), C)})
    assert decide(followed, crossed, 1.0).claim == Claim(A, 7, 2, True, BOARD)
    alone = Scene(A, BOARD, 2, {})
    assert decide(followed, alone, FOLLOWED_SECONDS).claim == Claim(A, 7, 2, False, BOARD)


# A simulated swarm: every second a heartbeat per link, late or dropped as the seed says.

TICK_SECONDS = 0.25
HEAL_SECONDS = 40.0


@dataclass
class _Device:
    id: DeviceId
    rank: Rank
    links: set[int]
    up: bool = True
    standing: Standing = field(default_factory=Standing)
    detectors: dict[DeviceId, Detector] = field(default_factory=dict)
    words: dict[DeviceId, Word] = field(default_factory=dict)
    pulse: int = 0

    def step(self, now: float) -> None:
        states = {d: detector.state(now) for d, detector in self.detectors.items()}
        alive = {d: self.words[d] for d, state in states.items() if state == "alive"}
        suspect = frozenset(d for d, state in states.items() if state == "suspect")
        before = self.standing.term
        scene = Scene(self.id, self.rank, self.pulse, alive, suspect)
        self.standing = decide(self.standing, scene, now)
        assert self.standing.term >= before
        self.alive = frozenset(alive)

    def word(self) -> Word:
        return Word(self.standing.term, self.standing.claim, self.alive, self.rank)

    def told(self) -> tuple[int, DeviceId | None]:
        """What others follow."""
        claim = self.standing.claim
        return self.standing.term, None if claim is None else claim.coordinator

    def hear(self, sender: DeviceId, word: Word, now: float) -> None:
        detector = self.detectors.setdefault(sender, Detector())
        if detector.state(now) == "gone":
            detector.connected(now)
        detector.heard(now)
        self.words[sender] = word

    def restart(self) -> None:
        """What a restarted daemon keeps: its identity and its term."""
        self.up, self.pulse = True, 0
        self.standing = Standing(term=self.standing.term)
        self.detectors, self.words = {}, {}


class _Swarm:
    def __init__(self, rng: random.Random, count: int, links: set[frozenset[int]]) -> None:
        self.rng, self.links, self.now = rng, links, 0.0
        self.drop = 0.0
        self.mail: list[tuple[float, int, DeviceId, Word]] = []
        ranks = [
            Rank(rng.random() < 0.3, rng.random() < 0.5, rng.randrange(4)) for _ in range(count)
        ]
        self.devices = [
            _Device(DeviceId(f"{i:064x}"), rank, set(), standing=Standing(term=rng.randrange(9)))
            for i, rank in enumerate(ranks)
        ]
        self.phase = [rng.random() for _ in range(count)]

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_SECONDS
            due = [m for m in self.mail if m[0] <= self.now]
            self.mail = [m for m in self.mail if m[0] > self.now]
            for _, to, sender, word in due:
                if self.devices[to].up:
                    self.devices[to].hear(sender, word, self.now)
            for i, device in enumerate(self.devices):
                if device.up:
                    before = device.told()
                    device.step(self.now)
                    due_now = (self.now + self.phase[i]) % 1.0 < TICK_SECONDS
                    # as in the service, what others follow is told without waiting for the beat
                    if due_now or device.told() != before:
                        self._beat(i, device)

    def _beat(self, i: int, device: _Device) -> None:
        device.pulse += 1
        device.step(self.now)
        for link in self.links:
            if i in link and self.rng.random() >= self.drop:
                (to,) = link - {i}
                self.mail.append((self.now + self.rng.random() * 0.3, to, device.id, device.word()))

    def groups(self) -> list[set[int]]:
        left = {i for i, device in enumerate(self.devices) if device.up}
        groups = []
        while left:
            group, new = set(), {left.pop()}
            while new:
                group |= new
                new = {j for link in self.links if link & new for j in link} & left - group
                left -= new
            groups.append(group)
        return groups

    def check(self) -> None:
        for group in self.groups():
            claims = [self.devices[i].standing.claim for i in group]
            followed = {claim.coordinator for claim in claims if claim is not None}
            assert None not in claims, "a device without a coordinator"
            assert len(followed) == 1, f"{len(followed)} coordinators in one group"
            assert followed <= {self.devices[i].id for i in group}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 7), sparse=st.booleans())
@example(seed=15, count=5, sparse=True)
@example(seed=4288264, count=6, sparse=True)
def test_every_connected_group_converges_to_one_coordinator(
    seed: int, count: int, sparse: bool
) -> None:
    rng = random.Random(seed)
    every = {frozenset(pair) for pair in combinations(range(count), 2)}
    swarm = _Swarm(rng, count, set(every))
    for _ in range(3):
        swarm.drop = rng.choice([0.0, 0.2, 0.5])
        swarm.links = {link for link in every if rng.random() < 0.6}
        for device in swarm.devices:
            if rng.random() < 0.3:
                device.up = False
            elif not device.up:
                device.restart()
        swarm.run(rng.uniform(1.0, 15.0))
    swarm.drop = 0.0
    if not sparse:
        swarm.links = every
    swarm.run(HEAL_SECONDS)
    swarm.check()
    terms = [device.standing.term for device in swarm.devices]
    swarm.run(20.0)
    swarm.check()
    assert terms == [device.standing.term for device in swarm.devices], "terms grow without need"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(3, 6))
@example(seed=371, count=6)
def test_a_killed_coordinator_is_replaced_by_the_same_one_on_all(seed: int, count: int) -> None:
    rng = random.Random(seed)
    swarm = _Swarm(rng, count, {frozenset(pair) for pair in combinations(range(count), 2)})
    swarm.run(8.0)
    swarm.check()
    claim = swarm.devices[0].standing.claim
    assert claim is not None
    for device in swarm.devices:
        if device.id == claim.coordinator:
            device.up = False
    swarm.run(5.0)
    swarm.check()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(3, 7))
def test_a_newcomer_on_sparse_links_leaves_the_incumbent(seed: int, count: int) -> None:
    rng = random.Random(seed)
    tree = {frozenset((i, rng.randrange(i))) for i in range(1, count)}
    newcomer = count - 1
    (joined,) = (link for link in tree if newcomer in link)
    swarm = _Swarm(rng, count, tree - {joined})
    devices = swarm.devices
    devices[newcomer].standing = Standing(term=rng.randrange(99))
    devices[newcomer].rank = Rank(True, True, 99)
    swarm.run(30.0)
    swarm.check()
    incumbent = devices[0].standing.claim
    assert incumbent is not None
    swarm.links = tree
    for _ in range(80):
        swarm.run(TICK_SECONDS)
        claims = [device.standing.claim for device in devices[:newcomer]]
        assert {claim and claim.coordinator for claim in claims} == {incumbent.coordinator}
    swarm.check()
