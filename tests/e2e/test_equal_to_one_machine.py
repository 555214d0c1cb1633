"""Training and generating over daemons equals one process of torch, transformers and peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.e2e.devices import Device, swarm
from tests.e2e.small_models import MODEL_NAMES, Small, make_small

STEPS, BATCH, RATE = 20, 4, 1e-3
LOSS_TOLERANCE = 1e-4  # relative, each step
WEIGHT_TOLERANCE = 1e-4
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Three daemons that all tests of this module share."""
    with swarm(tmp_path_factory.mktemp("swarm"), 3) as found:
        yield found


@pytest.fixture(scope="module", params=MODEL_NAMES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small model: random ones, and the real ones where they are there."""
    return make_small(request.param, tmp_path_factory.mktemp(request.param))


def train(
    owner: Device, small: Small, output: Path, count: int, *options: str, ends: str = "never"
) -> list[dict[str, Any]]:
    """Train over the first `count` devices, the first of which may hold both ends; the events."""
    names = ",".join(("anna", "ben", "cleo")[:count])
    events = owner.events(
        "train", str(small.folder), "--data", str(small.text), "--output", str(output),
        "--steps", str(STEPS), "--batch-size", str(BATCH), "--microbatches", "2",
        "--sequence-length", str(small.length), "--learning-rate", str(RATE),
        "--warmup-steps", "2", "--no-shuffle", "--devices", names,
        "--owner-ends", ends, *options,
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    assert len(events[-1]["stages"]) == count + (ends == "always")
    return events


def check_losses(events: list[dict[str, Any]], run: reference.Run) -> None:
    """Every step's loss and learning rate."""
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    assert [e["learning_rate"] for e in steps] == pytest.approx(run.learning_rates, rel=1e-9)
    assert [event["loss"] for event in steps] == pytest.approx(run.losses, rel=LOSS_TOLERANCE)


def check_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Every weight that the output holds within 1e-4 of the reference's, in its tensor's scale.

    But the bias of the keys: softmax does not see it, its gradient is nothing but
    round-off, and AdamW makes whole steps of any sign out of that, in torch as here. It
    can only be as far as the two ways it may have gone.
    """
    assert found
    for name, tensor in found.items():
        expected = wanted[name]
        off = (tensor - expected).abs()
        if name.endswith("c_attn.bias"):
            third = len(off) // 3
            assert float(off[third : 2 * third].max()) <= 2 * RATE * STEPS, name
            off[third : 2 * third] = 0
        assert float(off.max()) <= WEIGHT_TOLERANCE * max(1.0, float(expected.abs().max())), name
        if not name.endswith("bias"):
            assert float(off.max()) <= WEIGHT_TOLERANCE * float(expected.abs().max()), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_full_fine_tuning(devices: list[Device], small: Small, tmp_path: Path, count: int) -> None:
    events = train(devices[0], small, tmp_path / "out", count)
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    run = reference.train(
        reference.load(small.folder), blocks, steps=STEPS, batch_size=BATCH,
        learning_rate=RATE, warmup_steps=2,
    )  # fmt: skip
    check_losses(events, run)
    check_weights(load_file(tmp_path / "out" / "model.safetensors"), run.weights)
    reloaded = reference.load(tmp_path / "out")
    check_weights(dict(reloaded.state_dict()), run.weights)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lora(devices: list[Device], small: Small, tmp_path: Path, count: int) -> None:
    adapter = small.make_adapter(tmp_path / "adapter")
    events = train(
        devices[0], small, tmp_path / "out", count,
        "--method", "lora", "--init-adapter", str(adapter),
    )  # fmt: skip
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    model = reference.with_adapter(reference.load(small.folder), adapter)
    run = reference.train(
        model, blocks, steps=STEPS, batch_size=BATCH, learning_rate=RATE, warmup_steps=2
    )
    check_losses(events, run)
    trained = {
        name.replace(".default.", "."): tensor
        for name, tensor in run.weights.items()
        if "lora_" in name
    }
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(found) == set(trained)
    check_weights(found, trained)
    again = reference.with_adapter(reference.load(small.folder), tmp_path / "out")
    assert reference.held_out_loss(again, blocks[:4]) == pytest.approx(
        reference.held_out_loss(model, blocks[:4]), rel=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "llama-untied"])  # the first is tied
def test_both_ends_on_the_owner(
    devices: list[Device], tmp_path: Path, name: str, method: str
) -> None:
    small = make_small(name, tmp_path)
    model, options = reference.load(small.folder), ["--method", method]
    if method == "lora":
        adapter = small.make_adapter(tmp_path / "adapter")
        options += ["--init-adapter", str(adapter)]
        model = reference.with_adapter(model, adapter)
    events = train(devices[0], small, tmp_path / "out", 2, *options, ends="always")
    assert [stage["name"] for stage in events[-1]["stages"]] == ["anna", "ben", "anna"]
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    run = reference.train(
        model, blocks, steps=STEPS, batch_size=BATCH, learning_rate=RATE, warmup_steps=2
    )
    check_losses(events, run)
    if method == "full":
        check_weights(load_file(tmp_path / "out" / "model.safetensors"), run.weights)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_generation(devices: list[Device], small: Small, count: int) -> None:
    names = ",".join(("anna", "ben", "cleo")[:count])
    answer = devices[0].json(
        "generate", str(small.folder), "--prompt", small.prompt,
        "--max-new-tokens", str(small.new_tokens), "--devices", names,
    )  # fmt: skip
    ids = small.encode(small.prompt)
    assert answer["prompt_tokens"] == len(ids)
    expected = reference.greedy(reference.load(small.folder), ids, small.new_tokens)
    assert answer["tokens"] == expected
    assert answer["text"] == small.decode(ids, expected)
    assert len(answer["stages"]) == count
