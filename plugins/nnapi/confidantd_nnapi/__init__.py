"""Android's Neural Networks API: what the phone's maker provides a driver for.

Known limits: Android 8.1 to 14; Android 15 deprecates it. Drivers differ: many compute in half
precision, and know no matrix product of two inputs, so training programs are often refused.
Both are found out when it is probed. Termux's `python-onnxruntime` has it.
"""

from __future__ import annotations

import platform

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.provider import Provider, ProviderBackend

NNAPI = Provider("NnapiExecutionProvider", "1.23", "Android only: pkg install python-onnxruntime")


def backend() -> ProviderBackend:
    """Whatever accelerator the phone offers."""
    return ProviderBackend("nnapi", NNAPI, "npu", _options, _device, coverage="products")


def _options(_setting: SessionSetting) -> dict[str, str]:
    """Half precision is off unless asked for, and Python can set none of its flags."""
    return {}


def _device() -> str:
    return f"Android accelerator ({platform.machine()})"
