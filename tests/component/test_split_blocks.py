"""Blocks in parts on several backends compute what the fused block computes, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from confidantd.engine.backends.base import Backend, DeviceKind, Probe, SessionSetting
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.models.spec import LoraSpec
from tests.component.engine_models import make_model, save_model
from tests.component.split_support import SplitModel, largest_error
from tests.openvino_backend import need_openvino

TOLERANCE = 1e-5  # relative to a tensor's largest element
# The requests that other tests use too, so that whole blocks are compiled once.
CASES = {
    "llama, full": None,
    "gpt2, full": None,
    "llama, lora": LoraSpec(4, 10.0, ("q_proj", "o_proj", "up_proj")),
    "gpt2, lora": LoraSpec(4, 10.0, ("c_attn", "c_proj")),
}


SECONDS: dict[str, Callable[[], Backend]] = {"cpu": CpuBackend, "openvino": need_openvino}


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    """A small model, full or with an adapter on sliced and shared modules."""
    kind = request.param.partition(",")[0]
    folder = save_model(kind, tmp_path_factory.mktemp(kind))
    return SplitModel(folder, CASES[request.param])


@pytest.mark.parametrize("second", SECONDS)
def test_every_split_of_heads(model: SplitModel, second: str) -> None:
    """Also in the recompute form, and with the gradients of several microbatches added up."""
    backends = [CpuBackend(), SECONDS[second]()]
    block = model.model.spec.block
    fused = model.fused()
    wanted, added = model.run(fused), model.run(fused, microbatches=3)
    for groups in range(block.kv_heads + 1):
        columns = (block.columns // 3, block.columns - block.columns // 3)
        with model.split(backends, (groups, block.kv_heads - groups), columns) as split:
            assert largest_error(model.run(split), wanted) < TOLERANCE
            assert largest_error(model.run(split, keep=False), wanted) < TOLERANCE
            assert largest_error(model.run(split, microbatches=3), added) < TOLERANCE


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_split_of_columns(model: SplitModel, data: st.DataObject) -> None:
    block = model.model.spec.block
    first = data.draw(st.integers(0, block.columns))
    second = data.draw(st.integers(0, block.columns - first))
    columns = (first, second, block.columns - first - second)
    groups = (0, block.kv_heads, 0)
    wanted = model.run(model.fused())
    with model.split([CpuBackend()] * 3, groups, columns) as split:
        assert largest_error(model.run(split), wanted) < TOLERANCE


def test_the_fused_block_equals_torch(tmp_path: Path) -> None:
    """Output and every gradient of a Llama block with grouped queries, by `transformers`."""
    model = SplitModel(save_model("llama", tmp_path))
    found = model.run(model.fused())
    reference = make_model("llama")
    inner: Any = reference.model
    generator = np.random.default_rng(3)
    x, dy = (
        torch.from_numpy(generator.normal(0, 1, found.y.shape).astype(np.float32)) for _ in range(2)
    )
    x.requires_grad_()
    positions = inner.rotary_emb(x, torch.arange(x.shape[1])[None])
    length = x.shape[1]
    later = torch.full((length, length), -1e30).triu(1)[None, None]
    y = inner.layers[0](x, position_embeddings=positions, attention_mask=later)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(dy)
    assert _error(found.y, y) < TOLERANCE
    assert _error(found.dx, x.grad) < TOLERANCE
    attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
    wanted = {
        "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj,
        "o": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
    }  # fmt: skip
    for name, module in wanted.items():
        gradient = module.weight.grad.T if name in ("o", "down") else module.weight.grad
        assert _error(found.gradients[f"{name}.weight"], gradient) < TOLERANCE


def _error(found: Any, wanted: torch.Tensor) -> float:
    expected = wanted.detach().numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class Failing:
    """A backend that is the CPU's until its nth run, which fails."""

    name = "failing"
    kind: DeviceKind = "cpu"
    shares_host_memory = False

    def __init__(self, good_runs: int, reason: str = "the driver is gone") -> None:
        self.left = good_runs
        self.reason = reason

    def probe(self) -> Probe:
        """Always there."""
        return CpuBackend().probe()

    def session(self, program: Path, setting: SessionSetting) -> Any:
        """One that counts."""
        return _Counted(self, CpuBackend().session(program, setting))


class _Counted:
    def __init__(self, owner: Failing, session: Any) -> None:
        self._owner, self._session = owner, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        """Fails when the count is used up."""
        self._owner.left -= 1
        if self._owner.left < 0:
            raise failures.Fail(self._owner.reason)
        return self._session.run(*arguments)


@pytest.mark.parametrize("good_runs", range(8))
def test_a_backend_that_fails_at_any_run_is_replaced_once(tmp_path: Path, good_runs: int) -> None:
    """Four programs a microbatch; the numbers stay, and so does what was added before."""
    model = SplitModel(save_model("llama", tmp_path))
    wanted = model.run(model.fused(), microbatches=2)
    told: list[str] = []
    with model.split([CpuBackend(), Failing(good_runs)], (1, 1), (40, 16), told) as split:
        found = model.run(split, microbatches=2)
    assert largest_error(found, wanted) < TOLERANCE
    assert len(told) == 1
    assert told[0].startswith("failing: ")
    assert "the driver is gone" in told[0]


def test_a_backend_without_memory_is_replaced(tmp_path: Path) -> None:
    """Its memory is not the device's: the CPU goes on."""
    model = SplitModel(save_model("llama", tmp_path))
    wanted = model.run(model.fused())
    told: list[str] = []
    full = Failing(1, "Failed to allocate memory for requested buffer of size 4194304")
    with model.split([CpuBackend(), full], (1, 1), (40, 16), told) as split:
        assert largest_error(model.run(split), wanted) < TOLERANCE
    assert len(told) == 1
