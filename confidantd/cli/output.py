"""What a command prints: rich in a terminal, plain elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from confidantd.errors import ConfidantError

MEGABYTE = 1_000_000


def console() -> Console:
    """Standard output; at most as wide as the terminal says."""
    return Console(highlight=False, soft_wrap=False)


def print_json(fields: Any) -> None:
    """One JSON document on one line."""
    print(json.dumps(fields), flush=True)


def print_error(failure: ConfidantError, *, as_json: bool) -> None:
    """One line on standard error, or the contract's object on standard output."""
    if as_json:
        print_json({"error": failure.to_wire()})
    else:
        line = " ".join(plain(str(failure)).split())
        print(f"confidant: {line}", file=sys.stderr, flush=True)


def plain(text: object) -> str:
    """Text from a daemon or a peer without control characters: safe in a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def cell(value: object, style: str = "", *, cut: bool = False) -> Text:
    """A table cell, never read as markup; `cut`: shortened where it does not fit, not folded."""
    text = "-" if value in (None, "") else plain(value)
    return Text(text, style=style, no_wrap=cut or None, overflow="ellipsis" if cut else None)


def size(amount: float | None) -> str:
    """Bytes as `12 kB`, `812 MB` or `3.2 GB`."""
    if amount is None:
        return "-"
    if amount >= 1000 * MEGABYTE:
        return f"{amount / (1000 * MEGABYTE):.1f} GB"
    if 0 < amount < MEGABYTE / 2:
        return f"{1000 * amount / MEGABYTE:.0f} kB"
    return f"{amount / MEGABYTE:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds as `250 ms`, `12.3 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
