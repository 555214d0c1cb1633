"""Runs a block split over the CPU and WebGPU, where WebGPU is: no torch, no compiler there.

`python -m tests.webgpu_split_driver FOLDER MODEL` reads what `tests.component.test_split_webgpu`
wrote into FOLDER: `programs.json` with paths by name, `splits.json` with what to run, `given.npz`
with input and weights, `wanted.npz` with what the fused block gives. MODEL is the model's folder.
Prints `{"failures": [why WebGPU was left out], "errors": [{tensor: relative error}, ...]}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.backends.registry import load_backend
from confidantd.engine.split.blocks import ATTENTION, MLP, SplitBlocks
from confidantd.engine.split.parts import BackendPrograms, BackendThread
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.engine.trained_weights import Group, Trained
from confidantd.errors import BackendError
from confidantd.models.folder import read_model
from confidantd.models.layout import Parameter
from confidantd.models.tensors import Source

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]
WEIGHT, GRADIENT = "weight.", "gradient."  # before names in the files


def main(folder: Path, model: Path) -> None:
    """Every split after the other; sessions of one size are made once."""
    spec = read_model(model).spec
    programs = {n: Path(p) for n, p in json.loads((folder / "programs.json").read_text()).items()}
    given, wanted = (_arrays(folder / f"{name}.npz") for name in ("given", "wanted"))
    backends = [CpuBackend(), load_backend("webgpu")]
    made = [BackendPrograms(backend, programs, 1) for backend in backends]
    threads = [BackendThread(backend.name) for backend in backends]
    failures: list[str] = []

    def failed(_name: str, failure: BackendError) -> None:
        failures.append(failure.message)

    errors = []
    for split in json.loads((folder / "splits.json").read_text()):
        counts = {ATTENTION: tuple(split["groups"]), MLP: tuple(split["columns"])}
        parts = make_parts(spec, None, made, threads, Placement(counts))
        blocks = SplitBlocks(parts, made[0], failed)
        errors.append(_errors(_run(blocks, given, keep=split["keep"]), wanted))
    for thread in threads:
        thread.close()
    print(json.dumps({"failures": failures, "errors": errors}))


def _arrays(file: Path) -> Arrays:
    with np.load(file) as found:
        return dict(found)


def _run(blocks: SplitBlocks, given: Arrays, *, keep: bool) -> Arrays:
    """Output, gradient by the input, and every gradient by a weight."""
    weights = {n.removeprefix(WEIGHT): a for n, a in given.items() if n.startswith(WEIGHT)}
    trained = {
        name: Trained(Source(Parameter(name, array.shape), name, transposed=False), array)
        for name, array in weights.items()
    }
    group = Group(weights, trained)
    y, saved = blocks.forward(given["x"], group, keep=keep)
    dx = blocks.backward(given["dy"], given["x"], saved, group)
    gradients = {f"{GRADIENT}{n}": t.gradient for n, t in trained.items() if t.gradient is not None}
    return {"y": y, "dx": dx, **gradients}


def _errors(found: Arrays, wanted: Arrays) -> dict[str, float]:
    """Largest difference relative to a tensor's largest element; one that is absent fails here."""
    return {
        name: float(np.abs(found[name] - array).max() / np.abs(array).max())
        for name, array in wanted.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
