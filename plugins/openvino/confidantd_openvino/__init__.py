"""OpenVINO: x86-64 processors, Intel's graphics and Intel's NPU, each a backend of its own.

It comes in two forms: the package `onnxruntime-ep-openvino` beside plain onnxruntime, which
finds processors of Intel only, and the build `onnxruntime-openvino`, which replaces
`onnxruntime`, runs on processors of other makers too, and is taken where it is installed.

Known limits: x86-64 on Linux and Windows only. An input that IOBinding binds is copied at
that moment. A thread keeps the core it is pinned to if it made the session itself; during
a run it may leave it. An NPU computes in half precision whatever is asked, so its products are
reported as inexact and it gets no work that must be exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import onnxruntime

from confidantd.engine.backends.base import Backend, DeviceKind, SessionSetting
from confidantd.engine.backends.cpu import processor_name
from confidantd.engine.backends.library import Library, LibraryBackend
from confidantd.engine.backends.provider import Provider, ProviderBackend

OPENVINO = Library(
    "onnxruntime_ep_openvino", "onnxruntime-ep-openvino", "OpenVINOExecutionProvider"
)
BUNDLED = Provider(OPENVINO.provider, "1.23", "pip install onnxruntime-openvino")
# Where the processor has bf16 or fp16 units, OpenVINO would use them without being asked.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
OTHER_MAKERS = (
    "it finds processors of Intel only; on others the build with OpenVINO in it works: "
    "pip uninstall onnxruntime, then pip install --no-deps onnxruntime-openvino"
)
DRIVER = "Intel graphics need their compute driver (Debian: intel-opencl-icd)"
Config = Callable[[SessionSetting], Mapping[str, str]]


def backend() -> Backend:
    """The CPU by oneDNN: a second CPU backend, often faster than ONNX Runtime's own."""
    return _backend("openvino", "cpu", _cpu_config, processor_name, OTHER_MAKERS)


def gpu() -> Backend:
    """Intel graphics."""
    return _backend("openvino-gpu", "gpu", lambda _: EXACT, lambda: "Intel graphics", DRIVER)


def npu() -> Backend:
    """The NPU of a Core Ultra processor."""
    return _backend("openvino-npu", "npu", lambda _: {}, lambda: "Intel NPU", "")


def _backend(
    name: str, kind: DeviceKind, config: Config, device: Callable[[], str], hint: str
) -> Backend:
    """The provider of the build if it has one, else the package's."""

    def options(setting: SessionSetting) -> dict[str, str]:
        return {"load_config": json.dumps({kind.upper(): dict(config(setting))})}

    if OPENVINO.provider in onnxruntime.get_available_providers():
        place = {"device_type": kind.upper()}
        return ProviderBackend(
            name,
            BUNDLED,
            kind,
            lambda setting: {**place, **options(setting)},
            device,
            broken_hint=hint if kind != "cpu" else "",
        )
    return LibraryBackend(name, OPENVINO, kind, options, absent_hint=hint)


def _cpu_config(setting: SessionSetting) -> dict[str, str]:
    """Threads are OpenVINO's own: it knows neither ONNX Runtime's nor `num_of_threads`.

    Left to itself it moves the calling thread to the first core for the run, where another
    backend may work, and forgets which core that thread was pinned to.
    """
    threads = {"INFERENCE_NUM_THREADS": str(setting.threads), "ENABLE_CPU_PINNING": "NO"}
    return {**EXACT, **threads}
