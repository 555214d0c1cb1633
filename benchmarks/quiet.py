"""Hears what the backends of a benchmark say."""

from __future__ import annotations

import sys

from confidantd.wire.worker import SplitChosen


class Quiet:
    """Hears what the backends say; only failures are shown."""

    def __init__(self) -> None:
        self.split: SplitChosen | None = None  # the last one

    def notice(self, code: str, message: str) -> None:
        """On standard error."""
        print(f"{code}: {message}", file=sys.stderr)

    def measuring(self, done: int, of: int) -> None:
        """Progress on a terminal."""
        if sys.stderr.isatty():
            print(f"\rmeasuring {done}/{of} ", end="", file=sys.stderr)

    def chosen(self, split: SplitChosen) -> None:
        """Kept."""
        self.split = split
