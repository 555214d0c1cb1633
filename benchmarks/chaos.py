"""Half an hour in which something breaks every ten seconds: all ends right, nothing is left behind.

Run from the project's folder, as root: `python -m benchmarks.chaos`. Six devices are daemons in
network namespaces. Three of them own a training job each (two adapters, one full fine-tuning),
again and again; a fourth one generates the same text again and again. Every ten seconds a worker
is killed, a device is killed, stopped in good order or cut off, and comes back some seconds
later; owners, too. What the jobs leave is compared with what they leave on a quiet day.
`--quick`: one minute of it; `--seed` chooses other faults.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.fleet import make_model, make_text
from benchmarks.report import Claim, parser, report
from tests.e2e.devices import Device, running
from tests.lan.chaos import NAMES, TOLERANCE, Chaos
from tests.lan.namespaces import Lan

MINUTES, QUICK_MINUTES = 30.0, 1.0
STEPS, TOKENS = 150, 250  # of a job, of a text
GROWN_REACH = 5.0  # MB
MORE_FILES_REACH = 8.0  # connections to others come and go


def claims(minutes: float, seed: int) -> Iterator[Claim]:
    """Of one run."""
    with tempfile.TemporaryDirectory() as made, Lan(len(NAMES)) as lan:
        folder = Path(made)
        model = make_model(folder / "model", 192, 512, 8)
        text = make_text(folder / "text.txt", 20_000)
        devices = [
            Device(folder / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(NAMES, lan.hosts, strict=True)
        ]
        with running(devices):
            chaos = Chaos(folder, lan, devices, model, text, STEPS, TOKENS)
            result = chaos.run(60 * minutes, seed)
    print(*result.wrong, sep="\n", file=sys.stderr)
    detail = (
        f"of {result.trained} jobs and {result.texts} texts; {len(result.faults)} faults, "
        f"seed {seed}; {result.epochs - result.trained} times a job went on in a new epoch"
    )
    yield Claim("jobs and texts that are another", float(len(result.wrong)), 0.0, "", detail)
    yield Claim("weights differ by", result.farthest_off, TOLERANCE, "relative")
    left = result.left_behind
    yield Claim("left behind", float(len(left)), 0.0, "things", ", ".join(left))
    for name, grown in result.grown_bytes.items():
        yield Claim(f"memory of the daemon {name}", grown / 1e6, GROWN_REACH, "MB more")
        more = float(result.more_files[name])
        yield Claim(f"files and sockets of the daemon {name}", more, MORE_FILES_REACH, "more")


if __name__ == "__main__":
    parsing = parser(__doc__.splitlines()[0])
    parsing.add_argument("--seed", type=int, default=int(time.time()), help="of the faults")
    given = parsing.parse_args()
    found = claims(QUICK_MINUTES if given.quick else MINUTES, given.seed)
    sys.exit(report(found, as_json=given.json))
