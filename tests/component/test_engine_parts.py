"""AdamW, sampling, tensors: the engine's parts against torch and known values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from confidantd.engine.adamw import CHUNK_ELEMENTS, Moments, Step, square_sum, update
from confidantd.engine.tensors import tensor_from_file
from confidantd.errors import CorruptFileError
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
    modules = "train_stage generation.stage split.decode_stage sampling quantised backends.probing"
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
