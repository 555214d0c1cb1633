"""XNNPACK: another set of CPU kernels, tuned for phones and boards with Arm processors.

Known limits: it takes products with a constant matrix (frozen weights: LoRA, generation), not
those of two inputs; the rest of a program runs on ONNX Runtime's CPU provider with as many
threads, by design. Termux's `python-onnxruntime` has it.
"""

from __future__ import annotations

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.cpu import processor_name
from confidantd.engine.backends.provider import Provider, ProviderBackend

XNNPACK = Provider("XnnpackExecutionProvider", "1.23", "on Android: pkg install python-onnxruntime")


def backend() -> ProviderBackend:
    """The CPU by other kernels."""
    return ProviderBackend("xnnpack", XNNPACK, "cpu", _options, processor_name, coverage="some")


def _options(setting: SessionSetting) -> dict[str, str]:
    """It has threads of its own beside those of ONNX Runtime."""
    return {"intra_op_num_threads": str(setting.threads)}
