"""`python -m confidantd.engine.measure --threads N`: how fast this device computes.

Prints `{"gflops": x, "memory_gbps": y}`: a float32 matrix product (as in training) and a
vector times a matrix larger than the cache (as in decoding), both by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import onnxruntime

from confidantd.engine.matmul_model import matmul_model
from confidantd.engine.program import session_options

_SQUARE = 512  # 0.27 GFLOP: 3 ms on a laptop core, 100 ms on a slow board's
_COLUMNS = 4096  # a matrix of 64 MiB
_BUDGET_SECONDS = 0.4  # for each of the two


def measure(threads: int) -> dict[str, float]:
    """Best rates seen within the time budget: GFLOP/s and GB/s."""
    session = onnxruntime.InferenceSession(
        matmul_model(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    square = np.ones((_SQUARE, _SQUARE), np.float32)
    seconds = _fastest(lambda: session.run(None, {"a": square, "b": square}))
    gflops = 2 * _SQUARE**3 / seconds / 1e9
    row = np.ones((1, _COLUMNS), np.float32)
    matrix = np.ones((_COLUMNS, _COLUMNS), np.float32)
    seconds = _fastest(lambda: session.run(None, {"a": row, "b": matrix}))
    return {"gflops": round(gflops, 2), "memory_gbps": round(matrix.nbytes / seconds / 1e9, 2)}


def _fastest(run: Callable[[], object]) -> float:
    """Shortest of the runs that fit into the budget, at least two: others only add noise."""
    run()
    best, spent = float("inf"), 0.0
    while spent < _BUDGET_SECONDS:
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        best, spent = min(best, taken), spent + taken
    return best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="measure this device's speed")
    parser.add_argument("--threads", type=int, default=1)
    print(json.dumps(measure(max(1, parser.parse_args().threads))))


if __name__ == "__main__":
    main()
