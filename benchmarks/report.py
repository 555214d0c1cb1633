"""What every benchmark prints: a line per claim, JSON with `--json`, status 1 if one fails."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Claim:
    """A measured value against what it shall reach; `at_most`: smaller is better."""

    claim: str
    value: float
    reach: float
    unit: str
    detail: str = ""
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value reaches what was claimed."""
        return self.value <= self.reach if self.at_most else self.value >= self.reach


def parser(description: str) -> argparse.ArgumentParser:
    """With `--quick` and `--json`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="under a minute, smaller shapes")
    made.add_argument("--json", action="store_true", help="one JSON object a claim")
    return made


def options(description: str) -> argparse.Namespace:
    """`--quick` and `--json`."""
    return parser(description).parse_args()


def report(claims: Iterable[Claim], *, as_json: bool) -> int:
    """Print each claim as soon as it is measured; gives the exit status."""
    all_hold = True
    for claim in claims:
        all_hold = all_hold and claim.holds
        if as_json:
            fields = asdict(claim)
            del fields["at_most"]
            print(json.dumps({**fields, "holds": claim.holds}), flush=True)
        else:
            sign = "<=" if claim.at_most else ">="
            verdict = "holds" if claim.holds else "FAILS"
            print(
                f"{verdict}  {claim.claim}: {claim.value:.4g} {claim.unit} "
                f"({sign} {claim.reach:g})  {claim.detail}",
                flush=True,
            )
    if not as_json:
        print(f"machine: {platform.machine()}, Python {platform.python_version()}")
    return 0 if all_hold else 1
