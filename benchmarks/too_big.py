"""A model larger than a device's memory: alone on its memory-mapped file, or over two and three.

Run from the project's folder, as root (control groups): `python -m benchmarks.too_big`. Every
device, daemon and workers together, has so much memory that it cannot hold the weights of a
random Llama of 370 million parameters in float32 (`--quick`: two devices only). Alone, the same
engine computes with the same file, whose pages come and go: daemons would refuse. One thread a
device.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import NAMES, Shape, make_model
from benchmarks.report import Claim, options, report
from tests.control_groups import MemoryCap
from tests.e2e.devices import Device, running

LARGE = Shape("370M", 1024, 2816, 24, 16, 16)
# Each device has half of the weights and this: its daemon's and worker's own, a tokenizer.
ROOM_BYTES = 430_000_000
PROMPT_TOKENS, NEW_TOKENS, ALONE_TOKENS, ROUNDS = 16, 64, 4, 3
REACH = 8.03  # Confidant (2025), over an offloading baseline


def forget(model: Path) -> None:
    """Let no page of its file be in memory: those would count as another group's."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(model: Path, most_bytes: int) -> float:
    """Tokens a second of the engine in so much memory."""
    forget(model)
    cap = MemoryCap(most_bytes)
    try:
        done = subprocess.run(  # noqa: S603
            [*cap.prefix, sys.executable, "-m", "benchmarks.too_big_alone", str(model),
             str(PROMPT_TOKENS), str(ALONE_TOKENS)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        cap.close()
    return float(json.loads(done.stdout)["tokens_per_second"])


def together(folder: Path, model: Path, most_bytes: int, count: int) -> tuple[float, list[int]]:
    """The same of so many devices, each with so much memory; and the new tokens."""
    forget(model)
    with contextlib.ExitStack() as stack:
        caps = [MemoryCap(most_bytes) for _ in range(count)]
        for cap in caps:
            stack.callback(cap.close)
        devices = [
            Device(folder / f"{count}{name}", name, prefix=cap.prefix)
            for name, cap in zip(NAMES[:count], caps, strict=True)
        ]
        with running(devices):
            speeds, tokens = [], list[int]()
            for _ in range(1 + ROUNDS):
                answer: dict[str, Any] = devices[0].json(
                    "generate", str(model), "--prompt", "x" * PROMPT_TOKENS, "--speculation",
                    "off", "--max-new-tokens", str(NEW_TOKENS),
                    "--devices", ",".join(NAMES[:count]),
                )  # fmt: skip
                speeds.append(float(answer["tokens_per_second"]))
                tokens = answer["tokens"]
        return statistics.median(speeds[1:]), tokens


def claims(shape: Shape, counts: Sequence[int]) -> Iterator[Claim]:
    """One device against two, and three."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_model(folder / shape.name, shape, half=False)  # computed with as it lies
        weights = (model / "model.safetensors").stat().st_size
        most = weights // 2 + ROOM_BYTES
        table = 4 * 32_000 * shape.hidden  # of which a token reads a row
        assert most < weights - table
        one = alone(model, most)
        texts: set[tuple[int, ...]] = set()
        for count in counts:
            speed, tokens = together(folder, model, most, count)
            texts.add(tuple(tokens))
            detail = (
                f"{speed:.2f} tokens/s, one device {one:.3f}; weights {weights / 1e6:.0f} MB, "
                f"each device {most / 1e6:.0f} MB"
            )
            title = f"{shape.name} over {count} devices that hold it"
            yield Claim(title, speed / one, REACH, "x of one that does not", detail, at_most=False)
        yield Claim("different texts", float(len(texts) - 1), 0, "")


if __name__ == "__main__":
    chosen = options(__doc__.splitlines()[0])
    counts = (2,) if chosen.quick else (2, 3)
    raise SystemExit(report(claims(LARGE, counts), as_json=chosen.json))
