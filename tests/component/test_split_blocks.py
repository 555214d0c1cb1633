"""Blocks in parts on several backends compute what the fused block computes, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from confidantd.config import Split
from confidantd.engine.backends.base import Backend, DeviceKind, Probe, SessionSetting
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.split.profile import Bench, measure_together
from confidantd.engine.split.scheduled import ScheduledBlocks
from confidantd.engine.split.team import Team
from confidantd.models.spec import LoraSpec
from tests.component.engine_models import make_model, save_model
from tests.component.split_support import Heard, SplitModel, largest_error
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


@pytest.mark.parametrize("second", SECONDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_split_of_columns(model: SplitModel, second: str, data: st.DataObject) -> None:
    backends = [CpuBackend(), SECONDS[second](), CpuBackend()]
    block = model.model.spec.block
    first = data.draw(st.integers(0, block.columns))
    second = data.draw(st.integers(0, block.columns - first))
    columns = (first, second, block.columns - first - second)
    groups = (0, block.kv_heads, 0)
    wanted = model.run(model.fused())
    with model.split(backends, groups, columns) as split:
        assert largest_error(model.run(split), wanted) < TOLERANCE


@dataclass(frozen=True)
class Torch:
    """A block of `transformers`: its output and gradients by our names, in our layout."""

    y: torch.Tensor
    dx: torch.Tensor
    gradients: dict[str, torch.Tensor]


def by_torch(kind: str, x: torch.Tensor, dy: torch.Tensor) -> Torch:
    """Forward and backward of the first block of `make_model(kind)`."""
    reference: Any = make_model(kind)
    length = x.shape[1]
    later = torch.full((length, length), -1e30).triu(1)[None, None]
    x.requires_grad_()
    if kind == "gpt2":
        layer = reference.transformer.h[0]
        y = layer(x, attention_mask=later)
    else:
        inner = reference.model
        layer = inner.layers[0]
        positions = inner.rotary_emb(x, torch.arange(length)[None])
        y = layer(x, position_embeddings=positions, attention_mask=later)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(dy)
    assert x.grad is not None
    return Torch(y, x.grad, _gpt2(layer) if kind == "gpt2" else _llama(layer))


def _llama(layer: Any) -> dict[str, torch.Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = {
        "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj,
        "o": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
        "norm1": layer.input_layernorm, "norm2": layer.post_attention_layernorm,
    }  # fmt: skip
    found = {f"{name}.weight": module.weight.grad for name, module in modules.items()}
    return found | {f"{name}.weight": found[f"{name}.weight"].T for name in ("o", "down")}


def _gpt2(layer: Any) -> dict[str, torch.Tensor]:
    modules = {
        "qkv": layer.attn.c_attn, "o": layer.attn.c_proj, "up": layer.mlp.c_fc,
        "down": layer.mlp.c_proj, "norm1": layer.ln_1, "norm2": layer.ln_2,
    }  # fmt: skip
    found = {f"{name}.weight": module.weight.grad for name, module in modules.items()}
    found |= {f"{name}.bias": module.bias.grad for name, module in modules.items()}
    return found | {f"{name}.weight": found[f"{name}.weight"].T for name in ("qkv", "up")}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_block_equals_torch_fused_and_split(kind: str, tmp_path: Path) -> None:
    """Output and every gradient, those of norms and biases too, by `transformers`."""
    model = SplitModel(save_model(kind, tmp_path))
    block = model.model.spec.block
    generator = np.random.default_rng(3)
    shape = model.run(model.fused()).y.shape
    x, dy = (torch.from_numpy(generator.normal(0, 1, shape).astype(np.float32)) for _ in range(2))
    wanted = by_torch(kind, x, dy)
    groups = (1, block.kv_heads - 1)
    columns = (block.columns // 3, block.columns - block.columns // 3)
    with model.split([CpuBackend()] * 2, groups, columns) as split:
        for found in (model.run(model.fused()), model.run(split)):
            assert _error(found.y, wanted.y) < TOLERANCE
            assert _error(found.dx, wanted.dx) < TOLERANCE
            assert found.gradients.keys() == wanted.gradients.keys()
            for name, gradient in wanted.gradients.items():
                assert _error(found.gradients[name], gradient) < TOLERANCE, name


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


class Wrong(Failing):
    """A backend that gives twice what it should of one output, and no error."""

    name = "wrong"

    def __init__(self, output: str) -> None:
        super().__init__(1_000_000)
        self.output = output

    def session(self, program: Path, setting: SessionSetting) -> Any:
        """One that doubles."""
        return _Doubling(self, CpuBackend().session(program, setting))


class _Doubling(_Counted):
    def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
        """All right but one."""
        found = self._session.run(names, feeds)
        assert isinstance(self._owner, Wrong)
        return [a * 2 if n == self._owner.output else a for n, a in zip(names, found, strict=True)]


@pytest.mark.parametrize("output", ["y", "gradient.up.weight"])
def test_a_backend_that_computes_something_else_gets_no_work(tmp_path: Path, output: str) -> None:
    """Whole or in shares; said once, and the others go on."""
    model = SplitModel(save_model("llama", tmp_path))
    heard = Heard()
    team = Team([CpuBackend(), Wrong(output)], model.programs, 2, heard)
    try:
        blocks = ScheduledBlocks(model.spec, model.block, team, heard, heard, "always")
        assert team.left_out == ["wrong"]
        assert largest_error(model.run(blocks), model.run(model.fused())) < TOLERANCE
    finally:
        team.close()
    (told,) = heard.notices
    assert "wrong computes something else than the CPU" in told


def test_shares_that_come_out_wrong_are_found(tmp_path: Path) -> None:
    """A backend that is right about whole blocks may still be wrong about parts of them."""
    model = SplitModel(save_model("llama", tmp_path))
    heard, bench = Heard(), Bench.of(model.spec, model.block)
    right = bench.results(model.fused())
    good = Failing(1_000_000)
    team = Team([CpuBackend(), good, Wrong("y")], model.programs, 3, heard)
    try:
        measure_together(bench, team, heard, 0.0, right)
        assert team.left_out == ["wrong"]
    finally:
        team.close()


@pytest.mark.parametrize("split", ["auto", "always"])
def test_what_is_remembered_is_checked_again(tmp_path: Path, split: Split) -> None:
    """A driver may have changed since: alone (`auto`) and in shares."""
    model = SplitModel(save_model("llama", tmp_path))
    good = Failing(1_000_000)
    good.name = "wrong"
    heard = Heard()
    for backend in (good, Wrong("dx")):
        team = Team([CpuBackend(), backend], model.programs, 2, heard)
        try:
            if heard.kept is not None:
                profile = json.loads(heard.kept)
                profile["alone"][0]["forward_seconds"] = 1.0  # the CPU is slow
                heard.kept = json.dumps(profile).encode()
            blocks = ScheduledBlocks(model.spec, model.block, team, heard, heard, split)
            assert largest_error(model.run(blocks), model.run(model.fused())) < TOLERANCE
        finally:
            team.close()
    assert team.left_out == ["wrong"]
    assert len(heard.notices) == 1
    assert heard.names[-1] == ["cpu"]


def test_weights_that_are_not_finite_are_no_backends_fault(tmp_path: Path) -> None:
    """A run that diverged: the CPU gives nan, too, and nobody is left out for it."""
    model = SplitModel(save_model("llama", tmp_path))
    model.block.weights["o.weight"][...] = np.nan
    heard = Heard()
    team = Team([CpuBackend(), Failing(1_000_000)], model.programs, 2, heard)
    try:
        ScheduledBlocks(model.spec, model.block, team, heard, heard, "always")
    finally:
        team.close()
    assert heard.notices == []
    assert heard.names == [["cpu", "failing"]]


def test_one_thread_is_not_shared_between_two(tmp_path: Path) -> None:
    """A cap on threads holds, even where sharing is asked for."""
    model = SplitModel(save_model("llama", tmp_path))
    heard = Heard()
    team = Team([CpuBackend(), Failing(1_000_000)], model.programs, 1, heard)
    try:
        ScheduledBlocks(model.spec, model.block, team, heard, heard, "always")
    finally:
        team.close()
    assert len(heard.names[0]) == 1
