"""Codes, the life of an invitation, and proofs of the code."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import ConfidantError, NotPairedError, UsageError, WrongCodeError
from confidantd.ids import DeviceId
from confidantd.swarm.pairing import MAX_WRONG, Code, Exchange, Invitation, new_code, read_code
from confidantd.wire.pairing import Card, decode_pairing, encode_pairing

INVITER, OTHER = DeviceId("a" * 64), DeviceId("b" * 64)
CARD = Card("-----BEGIN", "anna", 7480)


def exchanged(secret: str, seen: DeviceId = INVITER) -> tuple[Exchange, Exchange]:
    """A joiner who was told `secret` and sees a certificate, and an inviter with 123456."""
    joiner, inviter = Exchange("joiner", secret, seen), Exchange("inviter", "123456", INVITER)
    joiner.meet(inviter.share)
    inviter.meet(joiner.share)
    return joiner, inviter


def test_a_code_is_read_as_it_is_typed() -> None:
    code = new_code()
    assert read_code(str(code)) == code
    assert read_code(f" {str(code).replace('-', ' ')} ") == code
    assert str(Code("012", "345678")) == "012-345-678"


@pytest.mark.parametrize("text", ["", "12345678", "1234567890", "123-456-78x", "١٢٣-٤٥٦-٧٨٩"])
def test_what_is_no_code_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="nine digits"):
        read_code(text)


def test_who_knows_the_code_proves_it_and_nobody_else() -> None:
    joiner, inviter = exchanged("123456")
    inviter.check("joiner", joiner.signed("joiner", CARD))
    joiner.check("inviter", inviter.signed("inviter", CARD))
    joiner, inviter = exchanged("123457")
    with pytest.raises(WrongCodeError):
        inviter.check("joiner", joiner.signed("joiner", CARD))


def test_a_proof_counts_for_one_card_in_one_role_and_one_exchange() -> None:
    joiner, inviter = exchanged("123456")
    signed = joiner.signed("joiner", CARD)
    for changed in (
        replace(signed, certificate="-----OTHER"),
        replace(signed, port=1),
        replace(signed, proof=b""),
    ):
        with pytest.raises(WrongCodeError):
            inviter.check("joiner", changed)
    with pytest.raises(WrongCodeError):
        joiner.check("inviter", signed)  # reflected
    _, another = exchanged("123456")
    with pytest.raises(WrongCodeError):
        another.check("joiner", signed)  # replayed


def test_somebody_in_the_middle_with_another_certificate_is_a_wrong_guess() -> None:
    joiner, inviter = exchanged("123456", seen=OTHER)
    with pytest.raises(WrongCodeError):
        inviter.check("joiner", joiner.signed("joiner", CARD))


@pytest.mark.parametrize("share", [b"", b"A", b"B" + bytes(31), b"A" + b"\xff" * 32])
def test_a_malformed_half_of_the_exchange_is_refused(share: bytes) -> None:
    with pytest.raises(NotPairedError, match="malformed"):
        Exchange("inviter", "123456", INVITER).meet(share)


def test_an_invitation_ends_by_time_use_or_wrong_guesses() -> None:
    invitation = Invitation(new_code(), expires=10.0)
    assert invitation.at(9.9).open
    assert invitation.at(10.0).outcome == "expired"
    assert invitation.ended("joined").at(99.0).outcome == "joined"
    for wrong in range(MAX_WRONG):
        assert invitation.open, wrong
        invitation = invitation.guessed_wrong()
    assert invitation.at(0.0).outcome == "refused"


@given(st.binary(max_size=200))
def test_garbage_is_one_refusal(body: bytes) -> None:
    with pytest.raises(ConfidantError):
        decode_pairing(body)


def test_a_message_comes_back() -> None:
    assert decode_pairing(encode_pairing(CARD)[4:]) == CARD
