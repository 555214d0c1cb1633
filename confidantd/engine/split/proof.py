"""Whether a backend computes what the CPU's computes: checked on a real block, before it counts.

A provider may take a program and give something else: drivers and kernels have defects that
no error tells of. What differs by more than rounding gets no work.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.errors import BackendError

MOST_ERROR = 1e-3  # of a tensor's largest element; rounding is far below a tenth of it
SAMPLES = 65_536  # elements of each tensor that are compared: a copy of all would take memory
Sampled = dict[str, Floats]


def sampled(tensors: Mapping[str, Floats]) -> Sampled:
    """Elements of each tensor at even distances, all of a small one, as copies."""
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    return {name: np.array(f[:: max(1, f.size // SAMPLES)]) for name, f in flat.items()}


def check(backend: str, found: Sampled, right: Sampled) -> None:
    """BackendError if what `backend` found is not `right` to rounding."""
    for name, expected in right.items():
        error = np.abs(found[name] - expected).max(initial=0.0)
        if not error <= MOST_ERROR * np.abs(expected).max(initial=0.0):  # nan is wrong too
            raise BackendError(
                f"{backend} computes something else than the CPU: {name} of a block is wrong"
            )
