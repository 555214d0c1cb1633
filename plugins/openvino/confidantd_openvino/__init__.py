"""Intel's processors through OpenVINO: CPU, graphics and NPU, each a backend of its own.

Known limits: x86-64 on Linux and Windows only. An input that IOBinding binds is copied at
that moment. A thread keeps the core it is pinned to if it made the session itself; during
a run it may leave it. An NPU computes in half precision whatever is asked, so its products are
reported as inexact and it gets no work that must be exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.library import Library, LibraryBackend

OPENVINO = Library(
    "onnxruntime_ep_openvino", "onnxruntime-ep-openvino", "OpenVINOExecutionProvider"
)
# Where the processor has bf16 or fp16 units, OpenVINO would use them without being asked.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def backend() -> LibraryBackend:
    """The CPU by oneDNN: a second CPU backend, often faster than ONNX Runtime's own."""
    return LibraryBackend("openvino", OPENVINO, "cpu", _cpu_options)


def gpu() -> LibraryBackend:
    """Intel graphics."""
    return LibraryBackend(
        "openvino-gpu",
        OPENVINO,
        "gpu",
        _fixed_options("GPU", EXACT),
        absent_hint="Intel graphics need their compute driver (Debian: intel-opencl-icd)",
    )


def npu() -> LibraryBackend:
    """The NPU of a Core Ultra processor."""
    return LibraryBackend("openvino-npu", OPENVINO, "npu", _fixed_options("NPU", {}))


def _cpu_options(setting: SessionSetting) -> dict[str, str]:
    """Threads are OpenVINO's own: it knows neither ONNX Runtime's nor `num_of_threads`.

    Left to itself it moves the calling thread to the first core for the run, where another
    backend may work, and forgets which core that thread was pinned to.
    """
    threads = {"INFERENCE_NUM_THREADS": str(setting.threads), "ENABLE_CPU_PINNING": "NO"}
    return {"load_config": json.dumps({"CPU": {**EXACT, **threads}})}


def _fixed_options(
    device: str, config: dict[str, str]
) -> Callable[[SessionSetting], dict[str, str]]:
    found = {"load_config": json.dumps({device: config})}
    return lambda _setting: found
