"""Apple's graphics processors through Core ML, which every onnxruntime for macOS has built in.

Known limits: macOS 12 and later. Core ML decides by itself what a compiled program runs on;
the Neural Engine is left out because it computes in half precision. Operators that it lacks
stay on the CPU, and a program is compiled anew in every process.
"""

from __future__ import annotations

import platform

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.provider import Provider, ProviderBackend

COREML = Provider(
    "CoreMLExecutionProvider", "1.23", "macOS only: pip install --force-reinstall onnxruntime"
)


def backend() -> ProviderBackend:
    """The graphics processor of a Mac."""
    return ProviderBackend("coreml", COREML, "gpu", _options, _device, coverage="products")


def _options(_setting: SessionSetting) -> dict[str, str]:
    return {
        "ModelFormat": "MLProgram",  # the older format knows no matrix product of two inputs
        "MLComputeUnits": "CPUAndGPU",
        "AllowLowPrecisionAccumulationOnGPU": "0",
        "RequireStaticInputShapes": "1",  # others are slow, or wrong on some releases
    }


def _device() -> str:
    return f"Apple graphics ({platform.processor() or platform.machine()})"
