"""Whether a backend computes what the CPU's computes: checked on a real block, before it counts.

A provider may take a program and give something else: drivers and kernels have defects that
no error tells of. What differs by more than rounding gets no work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.errors import BackendError

MOST_ERROR = 1e-3  # of a tensor's largest element; rounding is far below a tenth of it
SAMPLES = 65_536  # elements of each tensor that are compared: a copy of all would take memory
Sampled = dict[str, Floats]


def sampled(tensors: Mapping[str, Floats]) -> Sampled:
    """Elements of each tensor at even distances, all of a small one, as copies.

    The distance is odd: an even one would find the same few columns in every row.
    """
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    return {name: np.array(f[:: f.size // SAMPLES | 1]) for name, f in flat.items()}


def check(backend: str, found: Sampled, right: Sampled) -> None:
    """BackendError if what `backend` found is not `right` to rounding.

    What is not finite on the CPU either, as after a run that diverged, tells nothing.
    """
    for name, expected in right.items():
        if not np.isfinite(expected).all():
            continue
        error = np.abs(found[name] - expected).max(initial=0.0)
        if not error <= MOST_ERROR * np.abs(expected).max(initial=0.0):  # nan is wrong too
            raise BackendError(
                f"{backend} computes something else than the CPU: {name} of a block is wrong"
            )


def wrong_ones(
    names: Sequence[str],
    together: Callable[[], Sampled],
    only: Callable[[str], Sampled],
    right: Sampled,
) -> dict[str, BackendError]:
    """Which backends to leave out, and why, where work is shared between `names`, the CPU first.

    `together` gives what all compute, `only` what comes out if one has its shares and the
    CPU all others. Without a culprit among them none is trusted.
    """
    if _is_right(together, right):
        return {}
    found: dict[str, BackendError] = {}
    for name in names[1:]:
        try:
            check(name, only(name), right)
        except BackendError as failure:
            found[name] = failure
    if found or _is_right(together, right):
        return found
    message = "with other backends at work it computes something else than the CPU"
    return {name: BackendError(f"{name}: {message}") for name in names[1:]}


def _is_right(together: Callable[[], Sampled], right: Sampled) -> bool:
    try:
        check("together", together(), right)
    except BackendError:
        return False
    return True
