"""Texts that end a generation, found in what comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets text through up to the one of `stops` that ends first, and holds back what could be
    the beginning of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop text has come, which is never shown."""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        ended = [(end, begin) for end, begin in found if begin >= 0]
        if ended:
            self._held = ""
            return text[: min(ended)[1]], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text is the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
