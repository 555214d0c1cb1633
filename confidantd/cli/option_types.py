"""Types of command-line options; a wrong value is a usage error (exit status 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Decorator = Callable[[Any], Any]

COUNT = click.IntRange(min=1)
WHOLE = click.IntRange(min=0)


def path(text: str) -> Path:
    """An absolute path, as the daemon runs in another folder; links stay what they are."""
    if not text:
        raise click.BadParameter("the path is empty")
    return Path(text).expanduser().absolute()


def names(text: str) -> list[str]:
    """The names of a comma-separated list; at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise click.BadParameter("no names are given")
    return found


def counts(text: str) -> list[int]:
    """The whole numbers over 0 of a comma-separated list."""
    found = names(text)
    if not all(number.isdecimal() and int(number) > 0 for number in found):
        raise click.BadParameter(f"{text} is not a list of whole numbers over 0")
    return [int(number) for number in found]


def amount(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        raise click.BadParameter(f"{text} is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise click.BadParameter(f"{text} is not a number of 0 or more")
    return number


def positive(text: str) -> float:
    """A finite number over 0."""
    number = amount(text)
    if number == 0:
        raise click.BadParameter("the number must be over 0")
    return number


def share(text: str) -> float:
    """A number over 0 and at most 1."""
    positive(text)
    return portion(text)


def portion(text: str) -> float:
    """A number from 0 to 1."""
    number = amount(text)
    if number > 1:
        raise click.BadParameter(f"{text} is over 1")
    return number


def options(*declared: _Decorator) -> Callable[[_Command], _Command]:
    """Several options as one decorator; they are listed in this order."""

    def declare(command: _Command) -> _Command:
        for option in reversed(declared):
            command = option(command)
        return command

    return declare
