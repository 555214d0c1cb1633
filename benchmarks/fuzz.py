"""A million hostile inputs for everything that reads what others wrote.

Run from the project's folder: `python -m benchmarks.fuzz` (`--seed N`: others). An input is a
good one with some bytes or values changed; it must be refused with one of our errors, or
read. What is not ends up in the folder given with `--keep`.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Claim, parser, report
from confidantd.ids import digest_of
from confidantd.worker.memory import give_back_freed, memory_bytes
from tests.fuzz.runner import fuzz, hangs_end
from tests.fuzz.targets import Target, targets

INPUTS, QUICK = 1_000_000, 50_000
WARM = 2_000  # inputs of each target before memory counts: caches fill
GROWTH_REACH, SLOWEST_REACH = 50.0, 1.0  # MB, seconds
MEGABYTE = 1e6


def claims(count: int, seed: int, keep: Path | None) -> Iterator[Claim]:
    """Findings, memory, and the slowest input."""
    with tempfile.TemporaryDirectory() as folder, hangs_end():
        every = list(targets(Path(folder)))
        for target in every:
            fuzz(target, WARM, seed + 1)
        before, began = _held(), time.monotonic()
        inputs = accepted = found = 0
        slowest, slow = 0.0, ""
        for target in every:
            outcome = fuzz(target, count // len(every) + 1, seed)
            inputs += outcome.inputs
            accepted += outcome.accepted
            found += len(outcome.findings)
            if outcome.slowest > slowest:
                slowest, slow = outcome.slowest, target.name
            _show(target, outcome.findings, keep)
        took, grown = time.monotonic() - began, (_held() - before) / MEGABYTE
    detail = f"{inputs:,} inputs for {len(every)} readers in {took:.0f} s, {accepted:,} read"
    yield Claim("findings", found, 0, "inputs", detail)
    yield Claim("memory growth", grown, GROWTH_REACH, "MB")
    yield Claim("slowest input", slowest, SLOWEST_REACH, "s", slow)


def _held() -> int:
    """Resident bytes, without what was freed and only not given back."""
    gc.collect()
    give_back_freed()
    return memory_bytes()


def _show(target: Target, findings: list[tuple[bytes, str]], keep: Path | None) -> None:
    for data, problem in findings:
        print(f"{target.name}: {problem}: {data[:100]!r}", file=sys.stderr)
        if keep is not None:
            name = f"{target.name.replace(' ', '_')}--{digest_of(data)[:8]}.bin"
            (keep / name).write_bytes(data)


if __name__ == "__main__":
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--seed", type=int, default=1, help="other inputs for another number")
    made.add_argument("--keep", type=Path, help="a folder for inputs that are findings")
    given = made.parse_args()
    wanted = QUICK if given.quick else INPUTS
    sys.exit(report(claims(wanted, given.seed, given.keep), as_json=given.json))
