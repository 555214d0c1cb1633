"""Who belongs to the swarm, from what members have said: pure.

A device trusts itself, whom it let in itself, whom those let in, and so on. A removed device's
statements count no longer, but for those that its remover knew and kept. Of two devices
that remove each other, the one counts whose statement came first.
"""

from __future__ import annotations

from collections.abc import Iterable

from confidantd.errors import DeviceError
from confidantd.ids import DeviceId, Digest, is_digest
from confidantd.wire.roster import MAX_CHANGE, MAX_STATEMENTS, Statement

OUT_OF_CHANGES = "let it start with a new identity: delete the folder identity in its home"


class Ledger:
    """The statements that count, seen from `me`. `gone`: by which change this device left a
    swarm or was removed from it; whoever lets it in again needs a higher one.
    """

    def __init__(self, me: DeviceId, gone: int = 0, counted: Iterable[Statement] = ()) -> None:
        """`counted`: statements that counted before, and do so unasked."""
        self.me, self.gone = me, gone
        self._read_again({statement.id: statement for statement in counted})

    @property
    def statements(self) -> tuple[Statement, ...]:
        """In the order in which they came to count."""
        return tuple(self._known.values())

    @property
    def members(self) -> dict[DeviceId, str]:
        """Certificates (PEM) of all other devices that belong to the swarm."""
        return {d: self._certificates[d] for d in self._admitted if self._belongs(d)}

    @property
    def removed_me(self) -> bool:
        """Whether this very device does not belong to the swarm any more."""
        removed = self._removed.get(self.me, 0)
        return removed > self.gone and removed >= self._own_admission

    def knows(self, statement: Digest) -> bool:
        """Whether it counts already."""
        return statement in self._known

    def certificate(self, device: DeviceId) -> str | None:
        """Of any device that ever belonged to the swarm."""
        return self._certificates.get(device)

    def removal_of(self, device: DeviceId) -> int:
        """The change by which a device was removed last; 0 if it never was."""
        return self._removed.get(device, 0)

    def introducers(self, device: DeviceId) -> set[DeviceId]:
        """Who let it in, when it came last."""
        change, said = self._admitted.get(device, 0), self._known.values()
        return {s.author for s in said if s.device == device and s.admits and s.change == change}

    def admission(self, device: DeviceId, certificate: str, gone: int) -> Statement | None:
        """This device lets another one in, which says by which change it was `gone` before; None
        if it did already.
        """
        change = max(self._removed.get(device, 0), gone) + 1
        if change >= MAX_CHANGE:
            raise DeviceError("this device was removed too often to be let in", OUT_OF_CHANGES)
        made = Statement(self.me, device, change, certificate)
        return None if self.knows(made.id) else made

    def removal(self, device: DeviceId) -> Statement:
        """This device removes another one, or itself."""
        admitted = self._own_admission if device == self.me else self._admitted.get(device, 0)
        change = max(admitted, self._removed.get(device, 0), 1)
        keeps = tuple(s.id for s in self._known.values() if s.author == device)
        return Statement(self.me, device, change, keeps=keeps)

    def say(self, statement: Statement) -> bool:
        """Count a statement of this device; whether it does."""
        return self._put(statement)

    def take(self, statements: Iterable[Statement]) -> bool:
        """Count those that count, in whatever order they come; whether any did."""
        waiting = [s for s in statements if _well_formed(s) and not self.knows(s.id)]
        news = False
        while waiting:
            late = [s for s in waiting if not self._put(s)]
            if len(late) == len(waiting):
                break
            waiting, news = late, True
        return news

    def put_signatures(self, signed: Iterable[Statement]) -> None:
        """Replace statements by the same ones with a signature."""
        self._known.update({s.id: s for s in signed if self.knows(s.id)})

    def copy(self) -> Ledger:
        """Another one that can be changed."""
        return Ledger(self.me, self.gone, self.statements)

    def _put(self, statement: Statement) -> bool:
        if len(self._known) >= MAX_STATEMENTS or not self._counts(statement):
            return False
        self._known[statement.id] = statement
        self._read(statement)
        while not statement.admits:  # its device's other statements may count no longer
            counting = {i: s for i, s in self._known.items() if self._counts(s)}
            if len(counting) == len(self._known):
                break
            self._read_again(counting)
        return True

    def _counts(self, statement: Statement) -> bool:
        author = statement.author
        if author == self.me or self._belongs(author):
            return True
        if author == statement.device and author in self._admitted:
            return True  # it leaves
        return statement.id in self._kept.get(author, ())

    def _belongs(self, device: DeviceId) -> bool:
        return self._admitted.get(device, 0) > self._removed.get(device, 0)

    def _read_again(self, known: dict[Digest, Statement]) -> None:
        """From its statements: the highest changes and the certificate of each device, and what
        its removal keeps.
        """
        self._known = known
        self._own_admission = 0
        self._admitted: dict[DeviceId, int] = {}
        self._removed: dict[DeviceId, int] = {}
        self._certificates: dict[DeviceId, str] = {}
        self._kept: dict[DeviceId, set[Digest]] = {}
        for statement in known.values():
            self._read(statement)

    def _read(self, s: Statement) -> None:
        if s.admits and s.device == self.me:
            self._own_admission = max(self._own_admission, s.change)
        elif s.admits:
            self._admitted[s.device] = max(self._admitted.get(s.device, 0), s.change)
            self._certificates[s.device] = s.certificate
        else:
            last = self._removed.get(s.device, 0)
            self._removed[s.device] = max(last, s.change)
            if s.change >= last:
                before = self._kept.get(s.device, set()) if s.change == last else set()
                self._kept[s.device] = before | set(s.keeps)


def _well_formed(s: Statement) -> bool:
    """Whether it can be a statement: nobody vouches for itself, and numbers are in their range."""
    if not (is_digest(s.author) and is_digest(s.device) and 0 < s.change < MAX_CHANGE):
        return False
    if s.admits:
        return s.author != s.device and not s.keeps
    return len(s.keeps) <= MAX_STATEMENTS and all(is_digest(kept) for kept in s.keeps)
