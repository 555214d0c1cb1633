"""The NPU (Hexagon) of Qualcomm's Snapdragon, by the package `onnxruntime-qnn`.

Known limits: the NPU computes floating point in half precision, so its products are reported
as inexact and it gets no work that must be exact; shapes must be fixed; compiling a program
takes seconds. Wheels exist for Windows and Linux, on Android only own builds.
"""

from __future__ import annotations

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.library import Library, LibraryBackend

QNN = Library("onnxruntime_qnn", "onnxruntime-qnn", "QNNExecutionProvider")


def backend() -> LibraryBackend:
    """The Hexagon NPU."""
    return LibraryBackend(
        "qnn", QNN, "npu", _options, absent_hint="it needs a Snapdragon with Qualcomm's NPU driver"
    )


def _options(_setting: SessionSetting) -> dict[str, str]:
    """Steady speed rather than a burst that heat ends: a job runs for hours."""
    return {
        "htp_performance_mode": "sustained_high_performance",
        "enable_htp_fp16_precision": "1",  # without it float32 programs are refused
    }
