"""Peak memory of every worker over 1, 2 and 4 devices, beside single-process torch.

Run from the project's folder: `python -m benchmarks.memory`. A Llama of 134 million parameters,
8 sequences of 128 tokens a step in 4 microbatches, float32. Devices are daemons on loopback
with one thread. Over several devices each has as much memory for jobs as the claim allows, and
the plan has to fit, as it has on small devices: it chooses form and number of microbatches. Where
nothing fits, they get more, 2 % at a time. With `--quick` the model is so small that what every
worker takes for itself, 100 MB, is an eighth of one device: then torch alone is compared with.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.memory_swarm import LLAMA_134M, SMALL, NoPlanError, Shape, Stage, Trainings
from benchmarks.report import Claim, options, report

SHARES = {2: 0.50, 4: 0.30}  # of one device, and of torch, that the worst device may take
MISS_REACH, MORE = 0.10, 1.02
MEGABYTE = 1e6


def torch_bytes(trainings: Trainings, method: str) -> int:
    """Peak of torch + transformers doing the same."""
    numbers = map(str, trainings.sequences)
    command = [
        sys.executable, "-m", "benchmarks.memory_torch", str(trainings.model), method, *numbers,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return int(done.stdout.splitlines()[-1])


def least(trainings: Trainings, method: str, count: int, cap: float) -> list[Stage]:
    """A run with so much memory for each device, or as little more as it takes."""
    while True:
        try:
            return trainings.run(method, count, int(cap))
        except NoPlanError:
            cap *= MORE


def worst_device(stages: Sequence[Stage]) -> int:
    """Peak bytes of the device that took most, both of its workers together if it had two."""
    found: dict[str, int] = {}
    for stage in stages:
        found[stage.device] = found.get(stage.device, 0) + stage.peak_bytes
    return max(found.values())


def claims(shape: Shape, methods: Sequence[str], counts: Sequence[int]) -> Iterator[Claim]:
    """Of each method: every number of devices, and how well it was predicted."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(shape, Path(folder))
        for method in methods:
            yield from claims_of(trainings, method, counts, beside_one=shape is not SMALL)


def claims_of(
    trainings: Trainings, method: str, counts: Sequence[int], *, beside_one: bool
) -> Iterator[Claim]:
    """One device and torch first: the others are compared with both, or with torch only."""
    rival = torch_bytes(trainings, method)
    alone = trainings.run(method, 1)
    one = worst_device(alone)
    seen = {1: alone}
    for count in counts:
        cap = SHARES[count] * min(one, rival)
        stages = seen[count] = least(trainings, method, count, cap)
        worst = worst_device(stages)
        others = {"one device": one, "torch": rival} if beside_one else {"torch": rival}
        for name, other in others.items():
            yield Claim(
                f"{method}, worst of {count} devices over {name}", worst / other, SHARES[count],
                "share", f"{worst / MEGABYTE:.0f} of {other / MEGABYTE:.0f} MB; {shown(stages)}",
            )  # fmt: skip
    for count, stages in seen.items():
        worst_miss = max(stages, key=lambda stage: abs(stage.miss))
        detail = f"{worst_miss.predicted_bytes / MEGABYTE:.0f} MB said; {shown(stages)}"
        miss = abs(worst_miss.miss)
        what = f"{method}, predicted peak over {count} devices, worst stage"
        yield Claim(what, miss, MISS_REACH, "miss", detail)


def shown(stages: Sequence[Stage]) -> str:
    """Layers, form and peak of each."""
    return ", ".join(
        f"{s.device} {s.layers} layers {s.form} {s.peak_bytes / MEGABYTE:.0f} MB" for s in stages
    )


if __name__ == "__main__":
    given = options(__doc__.splitlines()[0])
    chosen = (SMALL, ("full",), (2,)) if given.quick else (LLAMA_134M, ("full", "lora"), (2, 4))
    sys.exit(report(claims(*chosen), as_json=given.json))
