"""Who belongs to the swarm, from what members have said: pure.

A device trusts itself, whom it let in, whom those let in, and so on: whoever is not reached from
it on that way is nobody, however many vouch for each other. What a removed device said counts no
longer, except what its remover knew and kept. Of two devices that remove each other, the one
counts that was heard first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from confidantd.errors import DeviceError
from confidantd.ids import DeviceId, Digest, is_digest
from confidantd.wire.roster import (
    MAX_CERTIFICATE_CHARACTERS,
    MAX_CHANGE,
    MAX_OF_AUTHOR,
    MAX_ROSTER_BYTES,
    MAX_STATEMENTS,
    Statement,
)

OUT_OF_CHANGES = (
    "remove the member that said so (confidant members); or let it start with a new identity: "
    "delete the folder identity in its home"
)
Statements = Mapping[Digest, Statement]


class Ledger:
    """The statements that count, seen from `me`. `gone`: by which change this device left a
    swarm or was removed from it; whoever lets it in again needs a higher one.
    """

    def __init__(self, me: DeviceId, gone: int = 0, counted: Iterable[Statement] = ()) -> None:
        self.me, self.gone = me, gone
        self._known = {statement.id: statement for statement in counted}
        self._view = _View(me, self._known)
        self._known = self._view.counting(self._known)

    @property
    def statements(self) -> tuple[Statement, ...]:
        """In the order in which they came to count."""
        return tuple(self._known.values())

    @property
    def members(self) -> dict[DeviceId, str]:
        """Certificates (PEM) of all other devices that belong to the swarm."""
        view = self._view
        return {d: view.certificates[d] for d in view.reached if d != self.me}

    @property
    def removed_me(self) -> bool:
        """Whether this very device does not belong to the swarm any more."""
        removed = self._view.removed.get(self.me, 0)
        return removed > self.gone and removed >= self._view.admitted.get(self.me, 0)

    @property
    def gone_now(self) -> int:
        """`gone`, for one that was just removed or leaves: not by any number that it was told."""
        own = self._view.admitted.get(self.me, 0)
        return max(self.gone, min(self._view.removed.get(self.me, 0), own + 1), own, 1)

    def knows(self, statement: Digest) -> bool:
        """Whether it counts already."""
        return statement in self._known

    def certificate(self, device: DeviceId) -> str | None:
        """Of any device that ever belonged to the swarm."""
        return self._view.certificates.get(device)

    def introducers(self, device: DeviceId) -> set[DeviceId]:
        """Who let it in, when it came last."""
        change, said = self._view.admitted.get(device, 0), self._known.values()
        return {s.author for s in said if s.device == device and s.admits and s.change == change}

    def admit(self, device: DeviceId, certificate: str, gone: int = 0) -> int:
        """This device lets another one in, which says by which change it was `gone` before; gives
        by which it was.
        """
        change = max(self._view.removed.get(device, 0), gone) + 1
        if change >= MAX_CHANGE:
            raise DeviceError("this device was removed by too high a change", OUT_OF_CHANGES)
        self._say(Statement(self.me, device, change, certificate))
        return change - 1

    def remove(self, device: DeviceId) -> None:
        """This device removes another one, and keeps what it believed of what that one said."""
        change = max(self._view.admitted.get(device, 0), self._view.removed.get(device, 0), 1)
        self._say(Statement(self.me, device, change, keeps=self._said_by(device)))

    def depending_on(self, device: DeviceId) -> set[DeviceId]:
        """Who would not belong to the swarm without what a device said."""
        without = Statement(self.me, device, self._view.admitted.get(device, 1))
        after = _View(self.me, {**self._known, without.id: without})
        return self._view.reached - after.reached - {device}

    def farewell(self) -> Statement:
        """This device leaves; what it said of others stays right."""
        change = max(self._view.admitted.get(self.me, 0), 1)
        return Statement(self.me, self.me, change, keeps=self._said_by(self.me))

    def _said_by(self, device: DeviceId) -> tuple[Digest, ...]:
        """What a device said that can be meant: no removal by a number that no device has had."""
        admitted, said = self._view.admitted, self._known.items()
        return tuple(
            i for i, s in said
            if s.author == device and (s.admits or s.change <= admitted.get(s.device, 0))
        )  # fmt: skip

    def take(self, statements: Iterable[Statement]) -> bool:
        """Count those that count, in whatever order they come; whether any did."""
        new = {s.id: s for s in statements if _well_formed(s) and not self.knows(s.id)}
        return bool(new) and self._see({**self._known, **new})

    def put_signatures(self, signed: Iterable[Statement]) -> None:
        """Replace statements by the same ones with a signature."""
        self._known.update({s.id: s for s in signed if self.knows(s.id)})

    def copy(self) -> Ledger:
        """Another one that can be changed."""
        return Ledger(self.me, self.gone, self.statements)

    def _say(self, statement: Statement) -> None:
        self._see({**self._known, statement.id: statement})
        if not self.knows(statement.id):
            raise DeviceError("the list of members is full", "remove members that you do not know")

    def _see(self, statements: Statements) -> bool:
        """Judge all of them anew; whether that gives others than before."""
        before = self._known
        self._view = _View(self.me, _newest(statements))
        self._known = _bounded(self._view.counting(statements), self._view, self.me)
        if len(self._known) < len(self._view.counting(statements)):
            self._view = _View(self.me, self._known)
        return self._known.keys() != before.keys()


class _View:
    """What statements mean, seen from one device: whom it reaches, and by which changes devices
    came and went.
    """

    def __init__(self, me: DeviceId, statements: Statements) -> None:
        self._me = me
        removals = {i: s for i, s in statements.items() if not s.admits}
        admissions = {i: s for i, s in statements.items() if s.admits}
        counted: dict[Digest, Statement] = {}
        void: set[Digest] = set()
        changed = True
        while changed:
            self._reach(admissions, counted)
            wrong = [i for i, s in counted.items() if not self._may(i, s)]
            for i in wrong:  # whoever said so is out by now
                void.add(i)
                del counted[i]
            changed = bool(wrong) or self._count_more(removals, counted, void)
        self._removals = counted

    def counting(self, statements: Statements) -> dict[Digest, Statement]:
        """Those of them that count, in their order."""
        return {
            i: s
            for i, s in statements.items()
            if (i in self._removals if not s.admits else i in self._admissions)
        }

    def _count_more(
        self, removals: Statements, counted: dict[Digest, Statement], void: set[Digest]
    ) -> bool:
        """Take in order what removals have a say, up to the first that puts somebody out."""
        before = len(counted)
        for identity, s in removals.items():
            if identity in counted or identity in void or not self._may(identity, s):
                continue
            counted[identity] = s
            if s.device in self.reached and s.device != self._me:
                break
        return len(counted) > before

    def _reach(self, admissions: Statements, removals: Statements) -> None:
        """Follow the admissions from this device on, as far as these removals let it."""
        self.removed: dict[DeviceId, int] = {}
        self._expelled: dict[DeviceId, int] = {}  # removed by others
        self._kept: dict[tuple[DeviceId, bool], set[Digest]] = {}  # by others, and by itself
        for s in removals.values():
            self.removed[s.device] = max(s.change, self.removed.get(s.device, 0))
            self._kept.setdefault((s.device, s.leaves), set()).update(s.keeps)
            if not s.leaves:
                self._expelled[s.device] = max(s.change, self._expelled.get(s.device, 0))
        self.reached = {self._me}
        self.admitted: dict[DeviceId, int] = {}
        self.certificates: dict[DeviceId, str] = {}
        self._admissions: set[Digest] = set()
        waiting = admissions
        while True:
            late = {i: s for i, s in waiting.items() if not self._follow(i, s)}
            if len(late) == len(waiting):
                return
            waiting = late

    def _follow(self, identity: Digest, s: Statement) -> bool:
        if not self._may(identity, s):
            return False
        self._admissions.add(identity)
        if s.change >= self.admitted.get(s.device, 0):
            self.admitted[s.device] = s.change
            self.certificates[s.device] = s.certificate
        if s.device != self._me and s.change > self.removed.get(s.device, 0):
            self.reached.add(s.device)
        return True

    def _may(self, identity: Digest, s: Statement) -> bool:
        """Whether its author has a say."""
        author = s.author
        if author in self.reached or identity in self._kept.get((author, False), ()):
            return True
        if self._expelled.get(author, 0) >= self.admitted.get(author, 0):
            return False  # it is nobody, or was put out: whatever it says of its leaving
        return s.leaves or identity in self._kept.get((author, True), ())


def _newest(statements: Statements) -> dict[Digest, Statement]:
    """Of what an author says of a device, of each kind, only the last counts, and what others
    stand on.
    """
    last: dict[tuple[DeviceId, DeviceId, bool], tuple[Digest, Statement]] = {}
    for identity, s in statements.items():
        key = (s.author, s.device, s.admits)
        if key not in last or s.change > last[key][1].change:
            last[key] = identity, s
    wanted = {identity for identity, _ in last.values()}
    wanted.update(kept for s in statements.values() for kept in s.keeps)
    return {identity: s for identity, s in statements.items() if identity in wanted}


def _bounded(statements: Statements, view: _View, me: DeviceId) -> dict[Digest, Statement]:
    """As many as there is room for: first this device's own and those that end a membership."""
    kept: set[Digest] = set()
    of_author: Counter[DeviceId] = Counter()
    room = MAX_ROSTER_BYTES

    def matters(s: Statement) -> bool:
        return s.author == me or (not s.admits and s.device in view.admitted)

    for identity, s in sorted(statements.items(), key=lambda item: not matters(item[1])):
        mine = s.author == me
        full = len(kept) >= MAX_STATEMENTS or of_author[s.author] >= MAX_OF_AUTHOR
        if s.size > room or (full and not mine):
            continue
        kept.add(identity)
        of_author[s.author] += 1
        room -= s.size
    return {identity: s for identity, s in statements.items() if identity in kept}


def _well_formed(s: Statement) -> bool:
    """Whether it can be a statement: nobody vouches for itself, and all is in its range."""
    if not (is_digest(s.author) and is_digest(s.device) and 0 < s.change < MAX_CHANGE):
        return False
    if s.admits:
        short = len(s.certificate) <= MAX_CERTIFICATE_CHARACTERS
        return not s.leaves and not s.keeps and short
    return len(s.keeps) <= MAX_OF_AUTHOR and all(is_digest(kept) for kept in s.keeps)
