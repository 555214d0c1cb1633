"""NVIDIA graphics processors, by the build `onnxruntime-gpu`.

Known limits: that build replaces `onnxruntime`; both fill one folder, so uninstall the other
first. It needs NVIDIA's driver, and each release of it one major version of CUDA and cuDNN
(1.31: CUDA 13, cuDNN 9). The first session takes a second and some 300 MB for the CUDA
context. The first processor is used.
"""

from __future__ import annotations

import functools
import subprocess

import onnxruntime

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.provider import Provider, ProviderBackend

CUDA = Provider("CUDAExecutionProvider", "1.23", 'pip install "onnxruntime-gpu[cuda,cudnn]"')
DRIVER_HINT = (
    "it needs NVIDIA's driver, CUDA and cuDNN: "
    'nvidia-smi shows the driver, pip install "onnxruntime-gpu[cuda,cudnn]" brings the rest'
)
DRIVER_SECONDS = 10.0  # nvidia-smi wakes a sleeping processor


def backend() -> ProviderBackend:
    """The first NVIDIA processor; nodes that compute shapes stay on the CPU by design."""
    return ProviderBackend(
        "cuda", CUDA, "gpu", _options, _device, coverage="products", broken_hint=DRIVER_HINT
    )


def _options(_setting: SessionSetting) -> dict[str, str]:
    """Memory is taken as needed, not doubled each time, and TF32 would round to 10 bits."""
    _load_cuda()
    return {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


@functools.cache
def _load_cuda() -> None:
    """Find CUDA and cuDNN where pip puts them: the loader itself looks only in the system."""
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


def _device() -> str:
    command = ["nvidia-smi", "--id=0", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603  # a fixed command
            command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "NVIDIA GPU"
    return done.stdout.strip() or "NVIDIA GPU"
