"""Links of 10, 50 and 200 Mbit/s: the plan changes with them, and steps take what it says.

Run from the project's folder, as root: `python -m benchmarks.links`. Three equal devices are
daemons in network namespaces with shaped links and in control groups with 0.45 of a core
each. At each rate the job runs as planned, and over one, two and three devices as asked for.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fleet import NAMES, Run, make_model, make_text, timed
from benchmarks.report import Claim, options, report
from tests.control_groups import quotas
from tests.e2e.devices import Device, running, wait_until
from tests.lan.namespaces import Lan

RATES, DEVICES, SHARE = (10.0, 50.0, 200.0), 3, 0.45
HIDDEN, COLUMNS, LAYERS = 384, 1056, 6
MICROBATCHES, SEQUENCES, LENGTH, STEPS = 16, 2, 128, 4
LINKS_SECONDS = 60.0
MISS_REACH, BEST_REACH = 0.15, 1.05
SHAPE = (
    "--batch-size", str(SEQUENCES * MICROBATCHES), "--microbatches", str(MICROBATCHES),
    "--sequence-length", str(LENGTH), "--owner-ends", "never",
)  # fmt: skip


@contextmanager
def network(folder: Path, mbit: float) -> Iterator[list[Device]]:
    """Devices that know how fast their links are."""
    with Lan(DEVICES, mbit=mbit) as lan, quotas(*[SHARE] * DEVICES) as groups:
        devices = [
            Device(folder / name, name, prefix=(*group.prefix, *host.prefix), host=host.address)
            for name, host, group in zip(NAMES, lan.hosts, groups, strict=False)
        ]
        with running(devices):
            wait_until(lambda: links_known(devices), LINKS_SECONDS, "every link is measured")
            yield devices


def links_known(devices: Sequence[Device]) -> bool:
    """Whether each device shows a bandwidth to all others."""
    return all(
        peer["self"] or peer["bandwidth_mbps"] is not None
        for device in devices
        for peer in device.json("peers")["peers"]
    )


def even(devices: int) -> str:
    """`--layers` for so many equal devices."""
    ends = [LAYERS * i // devices for i in range(devices + 1)]
    return ",".join(str(b - a) for a, b in itertools.pairwise(ends))


def measured(folder: Path, mbit: float, steps: int) -> tuple[Run, dict[int, float]]:
    """The planned run, and the steps over each number of devices."""
    with network(folder, mbit) as devices:
        model = make_model(folder / "model", HIDDEN, COLUMNS, LAYERS)
        text = make_text(folder / "text.txt", 2 * SEQUENCES * MICROBATCHES * LENGTH)
        owner, found = devices[0], {}
        for count in range(1, DEVICES + 1):
            names = ",".join(device.name for device in devices[:count])
            insists = ("--devices", names, "--layers", even(count))
            run = timed(owner, model, text, folder / f"out{count}", steps, *SHAPE, *insists)
            found[count] = run.step_seconds()
        return timed(owner, model, text, folder / "out", steps, *SHAPE), found


def claims(rates: Sequence[float], steps: int) -> Iterator[Claim]:
    """At each rate, and over all."""
    used = []
    for mbit in rates:
        with tempfile.TemporaryDirectory() as folder:
            run, by_count = measured(Path(folder), mbit, steps)
        stages = len(run.plan["stages"])
        used.append(stages)
        said, took = run.plan["predicted"]["step_seconds"], run.step_seconds()
        each = ", ".join(f"{n}: {seconds:.2f} s" for n, seconds in by_count.items())
        yield Claim(
            f"{mbit:g} Mbit/s, predicted step", abs(said / took - 1), MISS_REACH, "miss",
            f"{stages} devices, predicted {said:.2f} s, measured {took:.2f} s",
        )  # fmt: skip
        yield Claim(
            f"{mbit:g} Mbit/s, over the best number of devices", took / min(by_count.values()),
            BEST_REACH, "times", f"planned {stages}; {each}",
        )  # fmt: skip
    rising = all(a <= b for a, b in itertools.pairwise(used)) and used[-1] > used[0]
    yield Claim(
        "faster links, more devices", float(rising), 1.0, "yes",
        " ".join(map(str, used)) + " devices", at_most=False,
    )  # fmt: skip


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    chosen = claims((10.0, 200.0), 3) if given.quick else claims(RATES, STEPS)
    sys.exit(report(chosen, as_json=given.json))
