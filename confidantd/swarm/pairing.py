"""Pairing by a short code: the code, an invitation's life, and the proofs. Pure.

A code is nine digits. The first three number the invitation, so that the joiner finds it
among several; the other six are the secret. Both sides run SPAKE2 over the secret, which
tells a listener nothing and gives whoever takes part without knowing it one guess.
The inviter's device id, as the joiner sees it in the TLS handshake, is an input of the
exchange: somebody in the middle with another certificate is a wrong guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from typing import Literal

from confidantd.errors import NotPairedError, UsageError, WrongCodeError
from confidantd.ids import DeviceId
from confidantd.wire.codec import pack, to_map
from confidantd.wire.pairing import Card

NUMBER_DIGITS, SECRET_DIGITS = 3, 6
INVITATION_SECONDS = 600.0
MAX_WRONG = 5
Role = Literal["joiner", "inviter"]
Outcome = Literal["waiting", "joined", "expired", "refused", "withdrawn"]


@dataclass(frozen=True, slots=True)
class Code:
    """Nine digits: a public number and a secret."""

    number: str
    secret: str

    def __str__(self) -> str:
        """As it is shown and read out: `123-456-789`."""
        half = SECRET_DIGITS // 2
        return f"{self.number}-{self.secret[:half]}-{self.secret[half:]}"


def new_code() -> Code:
    """A fresh random one."""
    digits = f"{secrets.randbelow(10 ** (NUMBER_DIGITS + SECRET_DIGITS)):09d}"
    return Code(digits[:NUMBER_DIGITS], digits[NUMBER_DIGITS:])


def read_code(text: str) -> Code:
    """As it was typed, with any blanks and dashes; `UsageError` if it is none."""
    digits = re.sub(r"[\s\-]", "", text)
    if not re.fullmatch(r"[0-9]{9}", digits):
        raise UsageError(
            "a code is nine digits, like 123-456-789", "`confidant invite` on a member shows one"
        )
    return Code(digits[:NUMBER_DIGITS], digits[NUMBER_DIGITS:])


@dataclass(frozen=True, slots=True)
class Invitation:
    """One use of a code: open until it is used, expires, or was guessed wrong too often.

    `expires` is on the clock of whoever asks (`now`, in seconds).
    """

    code: Code
    expires: float
    wrong: int = 0
    outcome: Outcome = "waiting"

    def at(self, now: float) -> Invitation:
        """As it stands now."""
        if self.outcome == "waiting" and now >= self.expires:
            return replace(self, outcome="expired")
        return self

    def guessed_wrong(self) -> Invitation:
        """Somebody did not know the code."""
        wrong = self.wrong + 1
        return replace(self, wrong=wrong, outcome="refused" if wrong >= MAX_WRONG else self.outcome)

    def ended(self, outcome: Outcome) -> Invitation:
        """Used or withdrawn."""
        return replace(self, outcome=outcome)

    @property
    def open(self) -> bool:
        """Whether a joiner may still try."""
        return self.outcome == "waiting"


class Exchange:
    """One side of one pairing: its half of SPAKE2 (`share`), and proofs once both are there."""

    def __init__(self, role: Role, secret: str, inviter: DeviceId) -> None:
        from spake2 import SPAKE2_A, SPAKE2_B  # noqa: PLC0415 - a megabyte, for pairing only

        side = SPAKE2_A if role == "joiner" else SPAKE2_B
        self._side = side(secret.encode(), idA=b"joiner", idB=inviter.encode())
        self._key = b""
        self.share: bytes = self._side.start()

    def meet(self, share: bytes) -> None:
        """Take the other side's half; `NotPairedError` if it is none."""
        try:
            self._key = self._side.finish(share)
        except Exception:  # noqa: BLE001 - the library raises several kinds for bad input
            raise NotPairedError("the other device's part of the pairing is malformed") from None

    def signed(self, role: Role, card: Card) -> Card:
        """The card with its proof."""
        return replace(card, proof=self._proof(role, card))

    def check(self, role: Role, card: Card) -> None:
        """`WrongCodeError` unless a device that knows the code, in that role, wrote the card."""
        if not hmac.compare_digest(card.proof, self._proof(role, card)):
            raise WrongCodeError("the code is wrong", "compare it with the other device's screen")

    def _proof(self, role: Role, card: Card) -> bytes:
        said = pack({"role": role, **to_map(replace(card, proof=b""))})
        return hmac.new(self._key, said, hashlib.sha256).digest()
