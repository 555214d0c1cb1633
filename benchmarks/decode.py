"""Tokens a second in generation: quantised weights, one device, two and three of them on loopback.

Run from the project's folder: `python -m benchmarks.decode` (`--quick`: 134 million parameters
only). Random Llamas of 134 million and 1.1 billion parameters (TinyLlama's shape), a prompt of
128 tokens, 64 new ones, each device with one thread. Formats and numbers of devices take turns,
so that what disturbs the machine for a while spoils no comparison.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device, running
from tests.e2e.small_models import byte_tokenizer

NAMES = ("anna", "ben", "cleo")
PROMPT, NEW_TOKENS, ROUNDS = "The devices on the shelf. " * 5, 64, 5
PROMPT_TOKENS = 128
KEPT_SPEED_REACH, HOP_REACH = 0.93, 1.0  # of one device's speed; ms a token
FORMATS = ("int4", "int8", "none")
THREE_REACH, FASTER_REACH = 0.88, 2.0  # three devices of one; int4 of float32


@dataclass(frozen=True)
class Shape:
    """A Llama; TinyLlama's heads share four keys and values."""

    name: str
    hidden: int
    columns: int
    layers: int
    heads: int
    kv_heads: int


SMALL = Shape("134M", 768, 2048, 12, 12, 12)
LARGE = Shape("1.1B", 2048, 5632, 22, 32, 4)


def make_model(folder: Path, shape: Shape, *, half: bool = True) -> Path:
    """Random weights, saved in float16 as most models are, or in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=shape.hidden, intermediate_size=shape.columns,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=2048, bos_token_id=None,
        tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    (model.half() if half else model).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def cut(layers: int, count: int) -> list[int]:
    """As evenly as it goes, the rest on the first devices: the last one has the head."""
    return [layers // count + (1 if i < layers % count else 0) for i in range(count)]


@dataclass(frozen=True)
class Answer:
    """What one generation took."""

    decode: float  # tokens a second
    first_ms: float
    tokens: Sequence[int]


def generate(device: Device, model: Path, shape: Shape, form: str, count: int) -> Answer:
    """Once, over the first `count` devices."""
    found: dict[str, Any] = device.json(
        "generate", str(model), "--prompt", PROMPT[:PROMPT_TOKENS], "--quantise", form,
        "--max-new-tokens", str(NEW_TOKENS), "--devices", ",".join(NAMES[:count]),
        "--layers", ",".join(map(str, cut(shape.layers, count))),
    )  # fmt: skip
    return Answer(
        found["tokens_per_second"], found["time_to_first_token_ms"], tuple(found["tokens"])
    )


def claims(shapes: Sequence[Shape]) -> Iterator[Claim]:
    """All of them."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        devices = [Device(folder / name, name, "--threads", "1") for name in NAMES]
        with running(devices):
            for shape in shapes:
                model = make_model(folder / shape.name, shape)
                yield from _claims_of(devices[0], model, shape)


def _claims_of(device: Device, model: Path, shape: Shape) -> Iterator[Claim]:
    found: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for index in range(1 + ROUNDS):  # the first one quantises and fetches
        for form in FORMATS:
            for count in range(1, len(NAMES) + 1):
                answer = generate(device, model, shape, form, count)
                found[form, count] += [answer] if index else []
    alone = {form: _median(found[form, 1], "decode") for form in FORMATS}
    detail = ", ".join(f"{form} {speed:.1f}" for form, speed in alone.items()) + " tokens/s"
    faster = alone["int4"] / alone["none"]
    yield Claim(f"{shape.name} int4", faster, FASTER_REACH, "x of float32", detail, at_most=False)
    for form in FORMATS:
        speeds = {n: _median(found[form, n], "decode") for n in range(1, len(NAMES) + 1)}
        texts = {answer.tokens for n in speeds for answer in found[form, n]}
        title = f"{shape.name} {form}"
        for count in (2, 3):
            first = _median(found[form, count], "first_ms")
            detail = (
                f"{speeds[count]:.1f} tokens/s, first token after {first:.0f} ms; one device "
                f"{speeds[1]:.1f}, {_median(found[form, 1], 'first_ms'):.0f} ms"
            )
            kept = speeds[count] / speeds[1]
            reach = KEPT_SPEED_REACH if count == 2 else THREE_REACH
            yield Claim(f"{title}, {count} devices", kept, reach, "x of one", detail, at_most=False)
            hop = 1000 * (1 / speeds[count] - 1 / speeds[1]) / (count - 1)
            yield Claim(f"{title}, {count} devices: a hop", hop, HOP_REACH, "ms a token")
        yield Claim(f"{title}: different texts", float(len(texts) - 1), 0.0, "")


def _median(answers: Sequence[Answer], name: str) -> float:
    return statistics.median(float(getattr(answer, name)) for answer in answers)


if __name__ == "__main__":
    chosen = options(__doc__.splitlines()[0])
    raise SystemExit(
        report(claims([SMALL] if chosen.quick else [SMALL, LARGE]), as_json=chosen.json)
    )
