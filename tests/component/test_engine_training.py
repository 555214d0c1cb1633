"""Training stages compute what `transformers` and torch's AdamW compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from confidantd.models.folder import read_model
from confidantd.models.safetensors import Piece, write_file
from confidantd.wire.stage import OptimizerSpec
from tests.component.engine_models import (
    ROWS,
    TOKENS,
    make_model,
    random_ids,
    save_model,
    training_pipeline,
)

KINDS = ("llama", "llama-tied", "gpt2", "gpt2-untied")
RATE, DECAY, MOST_NORM = 3e-3, 0.05, 0.5
# AdamW divides a gradient by its own size: with the default of 1e-8, a gradient that is zero but
# for rounding (GPT-2's key bias, which softmax ignores) moves its weight by a random sign
EPSILON = 1e-5


def batch(seed: int, microbatches: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids [M, B, S], and labels of which some do not count."""
    ids = random_ids(seed, microbatches, ROWS, TOKENS)
    labels = ids.copy()
    labels[0, 0, :5] = -100
    return ids, labels


def reference_loss(model: Any, ids: NDArray[Any], labels: NDArray[Any]) -> torch.Tensor:
    """Mean over all predicted positions of the batch."""
    flat = torch.from_numpy(ids.reshape(-1, TOKENS))
    found = model(flat).logits[:, :-1].flatten(0, 1)
    wanted = torch.from_numpy(labels.reshape(-1, TOKENS))[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(found, wanted)


def assert_close(found: NDArray[Any], wanted: NDArray[Any], what: str, limit: float) -> None:
    """Largest difference relative to the largest value."""
    assert found.shape == wanted.shape, what
    assert found.dtype == np.float32, what
    scale = float(np.abs(wanted).max()) or 1.0
    assert float(np.abs(found - wanted).max()) / scale < limit, what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 3])
def test_loss_and_every_gradient_equal_transformers(tmp_path: Path, kind: str, stages: int) -> None:
    """A step of plain gradient descent shows each gradient in the weights."""
    pipeline = training_pipeline(save_model(kind, tmp_path), stages)
    model = make_model(kind)
    ids, labels = batch(1, 2)
    wanted = reference_loss(model, ids, labels)
    wanted.backward()  # type: ignore[no-untyped-call]

    loss = pipeline.gradients(ids, labels)

    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    found = gradients_by_name(pipeline)
    named = dict(model.named_parameters())
    assert found.keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert_close(found[name], parameter.grad.numpy(), name, 1e-5)


def gradients_by_name(pipeline: Any) -> dict[str, NDArray[np.float32]]:
    """Gradients under checkpoint names: read by letting them stand in for the weights."""
    for stage in pipeline.stages:
        for trained in stage._weights._by_name.values():
            trained.weight[...] = trained.gradient
    return dict(pipeline.trained())


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2-untied"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_steps_equal_adamw_on_one_device(tmp_path: Path, kind: str, stages: int) -> None:
    """Loss curve and weights over clipped steps with weight decay and microbatches."""
    settings = OptimizerSpec(weight_decay=DECAY, epsilon=EPSILON)
    pipeline = training_pipeline(save_model(kind, tmp_path), stages, optimizer=settings)
    model = make_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, eps=EPSILON)
    for step in range(5):
        ids, labels = batch(step, 1 + step % 3)
        wanted = reference_loss(model, ids, labels)
        optimizer.zero_grad()
        wanted.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
        optimizer.step()
        loss = pipeline.step(ids, labels, RATE, MOST_NORM)
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        assert pipeline.norms[-1] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > MOST_NORM  # else clipping would not be tested
    found = pipeline.trained()
    named = dict(model.named_parameters())
    assert found.keys() == named.keys()
    for name, parameter in named.items():
        assert_close(found[name], parameter.detach().numpy(), name, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_result(tmp_path: Path, kind: str) -> None:
    """A saved checkpoint with the trained tensors loads without a missing or unknown name."""
    model = save_model(kind, tmp_path)
    pipeline = training_pipeline(model, 2)
    ids, labels = batch(0, 1)
    pipeline.step(ids, labels, RATE, MOST_NORM)
    trained = pipeline.trained()
    pieces = [Piece(name, "F32", trained[name].shape, trained[name].tobytes()) for name in trained]
    write_file(tmp_path / "model.safetensors", pieces)

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    wanted = reference_loss(loaded, ids, labels).item()
    assert pipeline.gradients(ids, labels) == pytest.approx(wanted, rel=1e-5)
    assert read_model(tmp_path).spec == model.spec


@pytest.mark.parametrize("kind", ["llama-tied"])
def test_evaluation_keeps_nothing(tmp_path: Path, kind: str) -> None:
    """Summed loss and count of an evaluation, between two steps."""
    stages = training_pipeline(save_model(kind, tmp_path), 2).stages
    ids, labels = batch(4, 1)
    hidden, nothing = stages[0].evaluate(ids[0], None)
    assert hidden is not None
    assert nothing is None
    none, summed = stages[1].evaluate(hidden, labels[0])
    assert none is None
    assert summed is not None
    wanted = reference_loss(make_model(kind), ids, labels).item()
    assert summed[1] == int((labels[:, :, 1:] != -100).sum())
    assert summed[0] / summed[1] == pytest.approx(wanted, rel=1e-5)
    assert stages[0].resident_bytes()["kept"] == 0
