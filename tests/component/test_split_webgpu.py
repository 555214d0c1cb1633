"""Blocks in parts on the CPU and on WebGPU, on the software Vulkan driver, equal the fused ones.

What is compiled and what is compared with is made here; the parts run in the environment of
WebGPU, by `tests.webgpu_split_driver`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.component.engine_models import ROWS, TOKENS, save_model
from tests.component.split_support import SplitModel
from tests.webgpu_environment import WebGpu, need_webgpu
from tests.webgpu_split_driver import GRADIENT, WEIGHT

TOLERANCE = 1e-5  # relative to a tensor's largest element
Split = dict[str, Any]


def environment(folder: Path) -> WebGpu:
    """WebGPU's, with the one other package that the engine imports lent to it."""
    found = need_webgpu()
    folder.mkdir()
    (folder / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    paths = os.pathsep.join([found.environment["PYTHONPATH"], str(folder)])
    return dataclasses.replace(found, environment={**found.environment, "PYTHONPATH": paths})


def write_case(model: SplitModel, splits: Sequence[Split], folder: Path) -> None:
    """All that the driver reads: programs, splits, weights and input, and the fused block's y,
    dx and gradients.
    """
    shape = (ROWS, TOKENS, model.model.spec.block.hidden)
    x, dy = np.random.default_rng(7).normal(0, 1, (2, *shape)).astype(np.float32)
    fused = model.fused()
    y, saved = fused.forward(x, model.block, keep=True)
    dx = fused.backward(dy, x, saved, model.block)
    gradients = {f"{GRADIENT}{n}": t.gradient for n, t in model.block.trained.items()}
    assert all(gradient is not None for gradient in gradients.values())
    weights = {f"{WEIGHT}{name}": array for name, array in model.block.weights.items()}
    np.savez(folder / "given.npz", x=x, dy=dy, **weights)
    np.savez(folder / "wanted.npz", y=y, dx=dx, **gradients)
    programs = {name: str(path) for name, path in model.programs.items()}
    (folder / "programs.json").write_text(json.dumps(programs))
    (folder / "splits.json").write_text(json.dumps(splits))


def splits_of(groups: int, columns: int) -> list[Split]:
    """Every split of head groups; columns apart, all here, all there; and the recompute form."""
    third = columns // 3
    shares = [(third, columns - third)] * (groups + 1)
    shares[0], shares[-1] = (0, columns), (columns, 0)
    heads = [(here, groups - here) for here in range(groups + 1)]
    both = list(zip(heads, shares, strict=True))
    kept = [{"groups": h, "columns": c, "keep": True} for h, c in both]
    return [*kept, {"groups": heads[1], "columns": shares[1], "keep": False}]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cpu_and_webgpu_equal_the_fused_block(kind: str, tmp_path: Path) -> None:
    """A Llama with grouped queries and a GPT-2, y, dx and the gradient of every weight."""
    webgpu = environment(tmp_path / "lent")
    model = SplitModel(save_model(kind, tmp_path / "model"))
    block = model.model.spec.block
    splits = splits_of(block.kv_heads, block.columns)
    write_case(model, splits, tmp_path)
    found = webgpu.run_module("tests.webgpu_split_driver", str(tmp_path), str(tmp_path / "model"))
    assert found["failures"] == []
    for split, errors in zip(splits, found["errors"], strict=True):
        assert errors.keys() == {"y", "dx", *(f"{GRADIENT}{n}" for n in model.block.trained)}
        assert max(errors.values()) < TOLERANCE, (split, errors)
