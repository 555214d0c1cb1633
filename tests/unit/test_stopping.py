"""Texts that end a generation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from confidantd.jobs.stopping import StopTexts


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool, list[str]]:
    """The text that comes through, whether it was stopped, and it after each piece."""
    texts, so_far, text = StopTexts(stops), [], ""
    for piece in pieces:
        found, stopped = texts.push(piece)
        text += found
        so_far.append(text)
        if stopped:
            return text, True, so_far
    return text + texts.flush(), False, so_far


@given(
    st.lists(st.text("ab.", max_size=3), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3),
)
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    """What comes through is the text before the stop text that ends it first, as soon as no more
    of it can be the beginning of one.
    """
    text, stopped, so_far = shown(stops, pieces)
    whole = "".join(pieces)
    begun = [whole[: whole.find(stop) + len(stop)] for stop in stops if stop in whole]
    assert stopped == bool(begun)
    if stopped:
        shortest = min(begun, key=len)
        longest_stop = max((stop for stop in stops if shortest.endswith(stop)), key=len)
        assert text == shortest.removesuffix(longest_stop)
    else:
        assert text == whole
    for index, there in enumerate(so_far[:-1]):
        held = "".join(pieces[: index + 1])[len(there) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_text_over_several_pieces() -> None:
    assert shown(["\n\n"], ["one\n", "\ntwo"]) == ("one", True, ["one", "one"])
    assert shown(["END"], ["the E", "N", "d"]) == ("the ENd", False, ["the ", "the ", "the ENd"])
    assert shown([""], ["a"]) == ("a", False, ["a"])
