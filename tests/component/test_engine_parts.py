"""AdamW, sampling, tensors: the engine's parts against torch and known values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from confidantd.engine.adamw import CHUNK_ELEMENTS, Moments, Step, square_sum, update
from confidantd.engine.sampling import Sampler
from confidantd.engine.tensors import tensor_from_file
from confidantd.errors import CorruptFileError, UsageError
from confidantd.models.safetensors import Piece, read_header, write_file
from confidantd.wire.stage import OptimizerSpec


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay: float) -> None:
    """Twenty steps on an array of more than one chunk, with a changing learning rate."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, CHUNK_ELEMENTS // 2 + 7)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=weight_decay)
    moments, clip = Moments(weight), 0.7
    for step in range(1, 21):
        gradient = generator.normal(0, 1e-3, weight.shape).astype(np.float32)
        rate = 1e-2 / step
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.from_numpy(gradient) * clip
        optimizer.step()
        settings = OptimizerSpec(weight_decay=weight_decay)
        update(weight, gradient, moments, settings, Step(step, rate, clip))
    assert float(np.abs(weight - parameter.detach().numpy()).max()) < 1e-6


def test_square_sum_is_float64() -> None:
    """A float32 sum of this many equal squares would stop growing."""
    gradient = np.full(3 * CHUNK_ELEMENTS + 1, 1e-3, np.float32)
    assert square_sum(gradient) == pytest.approx(gradient.size * float(gradient[0]) ** 2, rel=1e-12)


def test_greedy_takes_the_first_of_equals() -> None:
    """Temperature 0."""
    assert Sampler(0, 1.0, 0).pick(np.array([0, 3, 3, 1], np.float32)) == 1


def test_sampling_follows_the_probabilities() -> None:
    """Frequencies of many draws, and the same draws for the same seed."""
    wanted = np.array([0.5, 0.3, 0.15, 0.05])
    logits = (2 * np.log(wanted)).astype(np.float32)  # temperature 2 undoes the factor
    one, same, other = (Sampler(2.0, 1.0, seed) for seed in (1, 1, 2))
    draws = [one.pick(logits) for _ in range(4000)]
    assert draws == [same.pick(logits) for _ in range(4000)]
    assert draws != [other.pick(logits) for _ in range(4000)]
    assert np.abs(np.bincount(draws, minlength=4) / 4000 - wanted).max() < 0.03


def test_a_sampler_goes_on_where_another_one_was() -> None:
    """After a loss the tokens so far are given to a new head."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    whole = Sampler(1.0, 0.9, 7)
    draws = [whole.pick(logits) for _ in range(60)]
    rest = Sampler(1.0, 0.9, 7, chosen=25)
    assert [rest.pick(logits) for _ in range(35)] == draws[25:]


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.79, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest(top_p: float, kept: int) -> None:
    """The smallest set of most likely tokens that reaches top-p."""
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3])).astype(np.float32)
    sampler = Sampler(1.0, top_p, 0)
    assert {sampler.pick(logits) for _ in range(500)} == set([1, 3, 0, 2][:kept])


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (float("nan"), 1), (1, 0), (1, 1.1)])
def test_senseless_sampling_is_refused(temperature: float, top_p: float) -> None:
    """With a message that names the value."""
    with pytest.raises(UsageError, match="must be"):
        Sampler(temperature, top_p, 0)


def test_dtypes_are_read_as_torch_writes_them(tmp_path: Path) -> None:
    """float64, float32, float16 and bfloat16 from one file."""
    values = torch.tensor([[1.5, -2.25, 3e-5], [65504.0, 0.0, -1.0]])
    path = tmp_path / "t.safetensors"
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    pieces = [
        Piece(name, name, (2, 3), values.to(kind).view(torch.uint8).numpy().tobytes())
        for name, kind in kinds.items()
    ]
    write_file(path, pieces)
    for name, at in read_header(path).items():
        found = tensor_from_file(at.file, at.offset, at.dtype, at.shape)
        assert np.array_equal(found.astype(np.float32), values.to(kinds[name]).float().numpy())
    with pytest.raises(CorruptFileError):
        tensor_from_file(path, path.stat().st_size - 8, "F32", (3,))


def test_engine_needs_no_torch() -> None:
    """Nor onnx, transformers or asyncio: what a worker imports stays small."""
    modules = "train_stage decode_stage sampling tensors backends.probing"
    program = (
        "import sys, importlib\n"
        f"for m in {modules.split()!r}: importlib.import_module('confidantd.engine.' + m)\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'asyncio', 'aiohttp', 'safetensors')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
