"""Devices that differ tenfold: what the plan makes of them, and how well a pipeline is filled.

Run from the project's folder, as root: `python -m benchmarks.heterogeneity`. Devices are
daemons in control groups with a share of a core each; together they need less than the
machine's two cores. What each can do alone is measured while the others do the same. Steps
are timed from outside, by when the owner hears of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet import Run, fleet, make_model, make_text, timed
from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device

LENGTH = 128
UNEQUAL, EQUAL = (0.9, 0.9, 0.09), (0.45, 0.45, 0.45, 0.45)
PAIR, THROTTLED_AFTER, STEPS_AFTER, REPLAN_SECONDS = (0.8, 0.8), 6, 8, 300.0
STEPS_REACH, THROUGHPUT_REACH = 20, 0.85
BOUND_REACH, EFFICIENCY_REACH, MISS_REACH = 0.90, 0.85, 0.10


def shape(microbatches: int) -> tuple[str, ...]:
    """One sequence a microbatch."""
    count = str(microbatches)
    return ("--batch-size", count, "--microbatches", count, "--sequence-length", str(LENGTH))


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model, and of its largest batch."""

    hidden: int
    columns: int
    layers: int
    microbatches: int


# Many thin layers where a device gets a twentieth of them, fewer and wider ones elsewhere.
THIN, WIDE = Size(384, 1056, 48, 64), Size(512, 1408, 20, 16)
FEW = 8  # microbatches where a slow device has the whole model


class Bench:
    """Jobs over the devices of one fleet."""

    def __init__(self, folder: Path, devices: Sequence[Device], size: Size) -> None:
        self._folder, self._devices = folder, devices
        self.model = make_model(folder / "model", size.hidden, size.columns, size.layers)
        self.text = make_text(folder / "text.txt", 2 * size.microbatches * LENGTH)
        self._runs = 0

    def _output(self) -> Path:
        self._runs += 1
        return self._folder / f"out{self._runs}"

    def begin(self, microbatches: int) -> Run:
        """One job over all devices that would go on for long."""
        names = ",".join(device.name for device in self._devices)
        return Run(
            self._devices[0], self.model, self.text, self._output(), "--steps", "1000",
            *shape(microbatches), "--devices", names,
        )  # fmt: skip

    def together(self, microbatches: int, steps: int, layers: Sequence[int] = ()) -> Run:
        """One job over all devices, as planned or with these layers."""
        given = [*shape(microbatches), "--devices", ",".join(d.name for d in self._devices)]
        if layers:
            given += ["--layers", ",".join(map(str, layers))]
        owner = self._devices[0]
        return timed(owner, self.model, self.text, self._output(), steps, *given)

    def alone(self, steps: int, microbatches: int) -> list[float]:
        """Seconds of a microbatch through the whole model on each device, all at work."""
        runs = [
            Run(
                device, self.model, self.text, self._output(), "--steps", "1000",
                *shape(microbatches), "--devices", device.name,
            )
            for device in self._devices
        ]  # fmt: skip
        try:
            for run in runs:
                run.wait_for(steps)
            return [run.step_seconds() / microbatches for run in runs]
        finally:
            for run in runs:
                run.end()


def unequal(folder: Path, steps: int) -> Iterator[Claim]:
    """Three devices at speeds 10:10:1."""
    microbatches, third = THIN.microbatches, THIN.layers // 3
    with fleet(folder, UNEQUAL) as (devices, _):
        bench = Bench(folder, devices, THIN)
        bench.together(FEW, 1)  # compiles and measures
        planned = bench.together(microbatches, steps)
        alone = bench.alone(3, FEW)
        equal = bench.together(16, 3, (third, third, third))
    speeds = [1 / seconds for seconds in alone]
    bound = sum(speeds) / (len(speeds) * min(speeds))
    gain = (equal.step_seconds() / 16) / (planned.step_seconds() / microbatches)
    stages = planned.plan["stages"]
    shares = ":".join(str(s["layers"][1] - s["layers"][0]) for s in stages)
    yield Claim(
        "speeds 10:10:1, of the bound over an equal split", gain / bound, BOUND_REACH, "share",
        f"{gain:.2f}x of {bound:.2f}x; layers {shares}, {microbatches} microbatches; "
        f"a microbatch alone {', '.join(f'{s:.3f}' for s in alone)} s",
        at_most=False,
    )  # fmt: skip
    yield predicted("speeds 10:10:1", planned)


def equal(folder: Path, steps: int, microbatches: int) -> Iterator[Claim]:
    """Four equal devices."""
    with fleet(folder, EQUAL) as (devices, _):
        bench = Bench(folder, devices, WIDE)
        bench.together(FEW, 1)
        planned = bench.together(microbatches, steps)
        alone = bench.alone(3, microbatches)
    speed = sum(1 / seconds for seconds in alone)
    bubble = (len(alone) - 1 + microbatches) / microbatches
    ideal = microbatches / speed * bubble
    yield Claim(
        "four equal devices, pipeline efficiency without the bubble",
        ideal / planned.step_seconds(), EFFICIENCY_REACH, "share",
        f"{ideal:.2f} s of {planned.step_seconds():.2f} s, {microbatches} microbatches",
        at_most=False,
    )  # fmt: skip
    yield predicted("four equal devices", planned)


def throttled(folder: Path) -> Iterator[Claim]:
    """One of two equal devices falls to a third of its speed in the middle of a job."""
    with fleet(folder, PAIR) as (devices, groups):
        bench = Bench(folder, devices, WIDE)
        bench.together(FEW, 1)
        run = bench.begin(WIDE.microbatches)
        try:
            run.wait_for(THROTTLED_AFTER)
            before = run.step_seconds()
            groups[1].set(PAIR[1] / 3)
            slow = run.steps
            run.wait_until(lambda: run.replanned_after is not None, REPLAN_SECONDS)
            replanned = run.replanned_after or 0
            run.wait_until(lambda: run.timed_steps > STEPS_AFTER, REPLAN_SECONDS)
            after = run.step_seconds()
        finally:
            run.end()
        best = bench.together(WIDE.microbatches, STEPS_AFTER).step_seconds()
    yield Claim(
        "a stage at a third of its speed, steps until it is replanned", replanned - slow,
        STEPS_REACH, "steps", f"step of {before:.2f} s before, {after:.2f} s after",
    )  # fmt: skip
    yield Claim(
        "a stage at a third of its speed, of the new optimum afterwards", best / after,
        THROUGHPUT_REACH, "share", f"a job planned then takes {best:.2f} s a step",
        at_most=False,
    )  # fmt: skip


def predicted(what: str, run: Run) -> Claim:
    """The plan's step time against the measured one."""
    said, took = run.plan["predicted"]["step_seconds"], run.step_seconds()
    detail = f"predicted {said:.2f} s, measured {took:.2f} s"
    return Claim(f"{what}, predicted step", abs(said / took - 1), MISS_REACH, "miss", detail)


def claims(*, quick: bool) -> Iterator[Claim]:
    """Every claim."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        if quick:
            yield from equal(base / "equal", 3, FEW)
            return
        yield from unequal(base / "unequal", 4)
        yield from equal(base / "equal", 8, WIDE.microbatches)
        yield from throttled(base / "throttled")


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    sys.exit(report(claims(quick=given.quick), as_json=given.json))
