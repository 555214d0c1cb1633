"""Guessing tokens ahead: how much faster, and never slower, with the same text.

Run from the project's folder, as root: `python -m benchmarks.speculation` (needs the real model of
`../shared`; `--quick`: one round). Two devices in network namespaces, 50 Mbit/s, where everything
arrives 20 ms later (a relay), and two without any delay; with guesses and without in turns. Texts
that repeat themselves are a small model's that lost its thread, and a random one's, both greedy;
others are drawn at random. Time is that from the first new token to the last.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decode import SMALL, make_model
from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device, met, running, wait_until
from tests.lan.namespaces import Lan
from tests.reference import MODELS

NAMES, MBIT, DELAY_MS, ROUNDS = ("anna", "ben"), 50.0, 20.0, 5
GAIN_REACH, KEPT_REACH = 1.5, 0.97
STORY = "Once upon a time, there was a little girl named Lily."
LITANY = "The cat is big. The dog is big. The ball is big. " * 5


@dataclass(frozen=True)
class Text:
    """What is generated."""

    title: str
    model: Path
    prompt: str
    tokens: int
    options: tuple[str, ...]
    repeats: bool = False


def generate(device: Device, text: Text, speculation: str) -> dict[str, Any]:
    """Once, over both devices."""
    found: dict[str, Any] = device.json(
        "generate", str(text.model), "--prompt", text.prompt, "--speculation", speculation,
        "--max-new-tokens", str(text.tokens), "--devices", ",".join(NAMES), *text.options,
    )  # fmt: skip
    return found


def compared(device: Device, text: Text, where: str, rounds: int) -> Iterator[Claim]:
    """With guesses and without, in turns."""
    speeds: dict[str, list[float]] = defaultdict(list)
    tokens, guessed = set(), 0
    for number in range(1 + rounds):
        for speculation in ("auto", "off") if number % 2 else ("off", "auto"):
            answer = generate(device, text, speculation)
            tokens.add(tuple(answer["tokens"]))
            if number:
                speeds[speculation].append(answer["tokens_per_second"])
                guessed += answer["guessed_tokens"]
    auto, off = (statistics.median(speeds[name]) for name in ("auto", "off"))
    share = guessed / (rounds * text.tokens)
    detail = f"{auto:.1f} tokens/s, without {off:.1f}; {share:.0%} of the tokens guessed"
    reach = GAIN_REACH if text.repeats and where != "no delay" else KEPT_REACH
    title = f"{text.title}, {where}"
    yield Claim(title, auto / off, reach, "x of without", detail, at_most=False)
    yield Claim(f"{title}: other texts", float(len(tokens) - 1), 0.0, "")


def texts(folder: Path) -> list[Text]:
    """With repetition and without, a small real model and a larger random one."""
    stories = MODELS / "stories260K"
    random = make_model(folder / SMALL.name, SMALL)
    drawn = ("--temperature", "1.5", "--seed", "3")
    return [
        Text("a litany", stories, LITANY, 150, (), repeats=True),
        Text("134M int4, a litany", random, "The devices on the shelf", 150,
             ("--quantise", "int4"), repeats=True),
        Text("a story with surprises", stories, STORY, 150, drawn),
        Text("134M int4, random words", random, "The devices on the shelf", 96,
             (*drawn, "--quantise", "int4")),
    ]  # fmt: skip


def claims(rounds: int) -> Iterator[Claim]:
    """Over a slow link, and without delay."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = texts(folder)
        with Lan(len(NAMES), mbit=MBIT, delay_ms=DELAY_MS) as lan:
            devices = [
                Device(folder / "lan" / name, name, prefix=host.prefix, host=host.address)
                for name, host in zip(NAMES, lan.hosts, strict=True)
            ]
            with running(devices):
                wait_until(lambda: met(devices), 60, "they have met")
                for text in wanted:
                    yield from compared(devices[0], text, f"{DELAY_MS:.0f} ms", rounds)
        devices = [Device(folder / "near" / name, name) for name in NAMES]
        with running(devices):
            for text in wanted:
                yield from compared(devices[0], text, "no delay", rounds)


if __name__ == "__main__":
    chosen = options(__doc__.splitlines()[0])
    raise SystemExit(report(claims(1 if chosen.quick else ROUNDS), as_json=chosen.json))
