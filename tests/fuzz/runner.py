"""Feeds hostile inputs to a target and keeps what should not have happened."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.fuzz.mutation import mixed
from tests.fuzz.targets import Target

HANG_SECONDS = 5.0
MOST_FINDINGS = 20  # of a target: more say nothing new


class HangError(BaseException):
    """An input took too long; no `except Exception` may swallow that."""


@dataclass
class Outcome:
    """What became of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0  # read without an error
    slowest: float = 0.0  # seconds
    findings: list[tuple[bytes, str]] = field(default_factory=list)


def fuzz(target: Target, count: int, seed: int) -> Outcome:
    """So many inputs, the same ones for the same seed."""
    draw, outcome = random.Random(f"{target.name} {seed}"), Outcome()
    for _ in range(count):
        data = mixed(target.seeds, draw, target.parse, target.write)
        began = time.perf_counter()
        problem = attempt(target, data)
        outcome.slowest = max(outcome.slowest, time.perf_counter() - began)
        outcome.inputs += 1
        outcome.accepted += problem is None
        if problem:
            outcome.findings.append((data, problem))
            if len(outcome.findings) >= MOST_FINDINGS:
                break
    return outcome


def attempt(target: Target, data: bytes) -> str | None:
    """None where the input was accepted, empty where it was refused as it should be, else
    what happened.
    """
    try:
        with _limited():
            target.read(data)
    except target.expected:
        return ""
    except HangError:
        return f"no end after {HANG_SECONDS:g} s"
    except Exception as failure:  # noqa: BLE001 - that is what is looked for
        return f"{type(failure).__name__}: {failure}"[:200]
    return None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def hangs_end() -> Iterator[None]:
    """Inside, an input that hangs is ended. Main thread only."""

    def too_long(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
