"""How fast a backend multiplies matrices, and whether what it says is right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from confidantd.engine.backends.base import RUN_FAILURES, Backend, SessionSetting, first_line
from confidantd.engine.onnx_bytes import matmul_model
from confidantd.errors import BackendError

# A product of the first size takes 0.4 ms on a laptop's core and 7 ms on a slow board's; it
# is doubled until one takes long enough for copies and calls not to be what is measured.
_SMALLEST, _LARGEST = 256, 4096
_LONG_ENOUGH_SECONDS = 0.002
_COLUMNS = 4096  # a matrix of 64 MiB, larger than any cache
_BUDGET_SECONDS = 0.4  # for each of the two
_CHECKED_ROWS = 8
# Single precision is off by about 1e-6 here, TF32 by 3e-4, half precision and bf16 by more.
MAX_ERROR = 5e-5

Array = NDArray[np.float32]
Multiply = Callable[[Array, Array], Array]


@dataclass(frozen=True, slots=True)
class Speed:
    """Best rates seen: of a float32 product as in training, of reading memory as in decoding.

    For a processor with memory of its own the first includes copying in and out; the
    second is None where a backend copies its inputs, for that is all it would tell.
    """

    gflops: float
    memory_gbps: float | None


def measure(backend: Backend, threads: int) -> Speed:
    """Raises BackendError if the backend fails at a product, or gives a wrong one."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "matmul.onnx"
        program.write_bytes(matmul_model())
        session = backend.session(program, SessionSetting(threads))
        multiply = _product(backend.name, session)
        gflops = _gflops(backend.name, multiply)
        memory = _memory_gbps(multiply) if backend.shares_host_memory else None
    return Speed(round(gflops, 2), None if memory is None else round(memory, 2))


def _product(name: str, session: onnxruntime.InferenceSession) -> Multiply:
    def multiply(a: Array, b: Array) -> Array:
        try:
            found: Array = session.run(None, {"a": a, "b": b})[0]
        except RUN_FAILURES as failure:
            message = f"the backend {name} fails at a matrix product ({first_line(failure)})"
            raise BackendError(message) from None
        return found

    return multiply


def _gflops(name: str, multiply: Multiply) -> float:
    a, b = _operands(_SMALLEST)
    _check(name, multiply, a, b)
    while len(a) < _LARGEST and _seconds(multiply, a, b, 0.0) < _LONG_ENOUGH_SECONDS:
        a, b = _operands(2 * len(a))
    return 2 * len(a) ** 3 / _seconds(multiply, a, b, _BUDGET_SECONDS) / 1e9


def _check(name: str, multiply: Multiply, a: Array, b: Array) -> None:
    """BackendError if the product is not right to single precision."""
    wanted = a[:_CHECKED_ROWS].astype(np.float64) @ b.astype(np.float64)
    found = multiply(a, b)[:_CHECKED_ROWS]
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not error <= MAX_ERROR:  # nan is wrong too
        raise BackendError(
            f"products of the backend {name} are off by {error:.0e}: "
            "it does not compute in single precision, and gets no work"
        )


def _memory_gbps(multiply: Multiply) -> float:
    row = np.ones((1, _COLUMNS), np.float32)
    matrix = np.ones((_COLUMNS, _COLUMNS), np.float32)
    return matrix.nbytes / _seconds(multiply, row, matrix, _BUDGET_SECONDS) / 1e9


def _operands(size: int) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    a, b = (random.uniform(-1, 1, (size, size)).astype(np.float32) for _ in range(2))
    return a, b


def _seconds(multiply: Multiply, a: Array, b: Array, budget_seconds: float) -> float:
    """Mean of the runs that fit into the budget, after one to warm up. Not the shortest: a
    device that is throttled stands still again and again, and would look many times as fast.
    """
    multiply(a, b)
    runs, started = 0, time.perf_counter()
    while True:
        multiply(a, b)
        runs, spent = runs + 1, time.perf_counter() - started
        if spent >= budget_seconds:
            return spent / runs
