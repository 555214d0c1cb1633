"""The head over chunks of tokens: the same numbers as over all at once, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from confidantd.engine.head import (
    IGNORED_LABEL,
    TABLE,
    HeadPass,
    chunks,
    head_loss,
    next_tokens,
    sizes_of,
    table_sum,
)
from confidantd.engine.program import load_programs
from confidantd.engine.rows import add_rows
from confidantd.engine.trained_weights import Group, StageWeights
from confidantd.models.folder import read_model
from confidantd.models.spec import ProgramRequest
from confidantd.planner.memory import HEAD_BYTES, head_chunk
from confidantd.wire.codec import to_map
from tests.component.engine_models import ROWS, TOKENS, make_model, reader, save_model, stage_specs
from tests.programs import programs_for

ALL = ROWS * TOKENS


def test_labels_move_to_the_token_that_predicts_them() -> None:
    labels = np.array([[1, 2, 3], [4, -100, 6]])
    assert next_tokens(labels).tolist() == [2, 3, -100, -100, 6, -100]


@pytest.mark.parametrize("size", [1, 5, 8, 12, 40])
def test_chunks_have_one_size_and_every_label_counts_once(size: int) -> None:
    wanted = np.arange(13)
    counted: list[int] = []
    written = np.full(13, -1)
    for part, labels in chunks(wanted, size):
        assert len(labels) == min(size, 13)
        written[part] = labels
        counted += [int(label) for label in labels if label != IGNORED_LABEL]
    assert sorted(counted) == list(range(13))
    assert written.tolist() == list(range(13))  # what was written last is what counts


def test_rows_of_repeated_tokens_add_up() -> None:
    generator = np.random.default_rng(0)
    ids, rows = generator.integers(0, 5, 40), generator.standard_normal((40, 3), np.float32)
    table = np.ones((9, 3), np.float32)
    wanted = table.copy()
    np.add.at(wanted, ids, rows)
    add_rows(table, ids, rows)
    assert np.allclose(table, wanted, atol=1e-6)
    add_rows(table, ids[:0], rows[:0])
    assert np.allclose(table, wanted, atol=1e-6)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model."""
    path = tmp_path_factory.mktemp(request.param)
    save_model(request.param, path)
    return path


@pytest.mark.parametrize("size", [5, 12, ALL])
def test_chunks_give_the_loss_and_gradients_of_torch(folder: Path, size: int) -> None:
    """Labels of which some do not count, and two microbatches, which add up."""
    model = read_model(folder)
    paths = programs_for(ProgramRequest(model.spec, "train", "full", None, ROWS, TOKENS))
    programs = load_programs(paths, {"head_backward", "head_loss"}, 1, None, sizes_of(size))
    (spec,) = stage_specs(model, 1, training="full")
    head = StageWeights(spec, reader(model.tensors), None).head
    generator = np.random.default_rng(size)
    xs = generator.standard_normal((2, ALL, spec.model.block.hidden), np.float32)
    wanted = generator.integers(0, spec.model.vocabulary, (2, ALL))
    wanted[:, ::4] = IGNORED_LABEL
    loss, dx = 0.0, np.empty_like(xs)
    for i in range(2):
        scale = np.array(0.05, np.float32)
        work = HeadPass(size, xs[i], wanted[i], scale, dx[i], table_sum(head))
        head.add_gradients(work.run(programs["head_backward"], head.weights).gradients)
        loss += work.loss
    expected = of_torch(folder, xs, wanted, head)
    assert loss == pytest.approx(expected.pop("loss"), rel=1e-5)
    assert close(dx, expected.pop("x"))
    for name, gradient in expected.items():
        assert close(head.trained[name].gradient, gradient), name
    evaluated = sum(
        head_loss(programs["head_loss"], size, xs[i], wanted[i], head.weights) for i in range(2)
    )
    assert 0.05 * evaluated == pytest.approx(loss, rel=1e-5)


def close(found: NDArray[Any] | None, wanted: NDArray[Any]) -> bool:
    """Within 1e-5 of the largest element."""
    assert found is not None
    return bool(np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max())


def of_torch(folder: Path, xs: NDArray[Any], wanted: NDArray[Any], head: Group) -> dict[str, Any]:
    """Loss and gradients of the model's own final norm and head."""
    kind = read_model(folder).spec.family
    model: Any = make_model(kind)
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    x = torch.from_numpy(xs).requires_grad_()
    logits = model.lm_head(norm(x))
    loss = 0.05 * torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(wanted).flatten(), reduction="sum"
    )
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"loss": loss.item(), "x": x.grad, "norm.weight": norm.weight.grad}
    found[TABLE] = model.lm_head.weight.grad
    if "norm.bias" in head.trained:
        found["norm.bias"] = norm.bias.grad
    return {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in found.items()}


def test_a_large_vocabulary_takes_bounded_memory(tmp_path: Path) -> None:
    """128,000 words and 600 tokens: two copies of all logits would be 614 MB."""
    tokens, vocabulary, width = 600, 128_000, 32
    spec = replace(save_model("llama", tmp_path).spec, vocabulary=vocabulary)
    asked, path = tmp_path / "request.json", tmp_path / "head.onnx"
    request = ProgramRequest(spec, "train", "full", None, ROWS, TOKENS)
    asked.write_text(json.dumps(to_map(request)))
    module("tests.component.export_head", asked, path)
    taken = module("tests.component.head_memory", path, tokens, vocabulary, width)
    assert head_chunk(tokens, vocabulary, "saved") < tokens
    # the chunk's logits, their labels' rows, and what a session takes for itself
    assert 0.5 * HEAD_BYTES["saved"] < int(taken) < 1.25 * HEAD_BYTES["saved"]


def module(name: str, *arguments: object) -> str:
    """What a module prints, run in a process of its own."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
