"""Any graphics processor through WebGPU: Vulkan, Metal or Direct3D 12 underneath.

It comes in two forms: the build `onnxruntime-webgpu`, which replaces `onnxruntime` and is
taken where it is installed, and the package `onnxruntime-ep-webgpu` beside plain onnxruntime.

Known limits: no double precision, and 64-bit integers not in arithmetic; a buffer holds what
the driver allows, often 128 MB to 2 GB, so a large embedding does not fit. Software drivers
(SwiftShader) compute right, and far too slowly for use.
"""

from __future__ import annotations

import sys

import onnxruntime

from confidantd.engine.backends.base import Backend, SessionSetting
from confidantd.engine.backends.library import Library, LibraryBackend
from confidantd.engine.backends.provider import Provider, ProviderBackend

WEBGPU = Library("onnxruntime_ep_webgpu", "onnxruntime-ep-webgpu", "WebGpuExecutionProvider")
BUNDLED = Provider(WEBGPU.provider, "1.23", "pip install onnxruntime-webgpu")
DRIVER_HINT = (
    "a graphics driver with Vulkan is needed (Debian: libvulkan1 and mesa-vulkan-drivers)"
    if sys.platform not in {"darwin", "win32"}
    else ""
)
GRAPHICS = {"darwin": "Metal", "win32": "Direct3D 12"}


def backend() -> Backend:
    """The provider of the build if it has one, else the package's."""
    if WEBGPU.provider in onnxruntime.get_available_providers():
        return ProviderBackend("webgpu", BUNDLED, "gpu", _options, _device, broken_hint=DRIVER_HINT)
    return LibraryBackend("webgpu", WEBGPU, "gpu", _options, absent_hint=DRIVER_HINT)


def _options(_setting: SessionSetting) -> dict[str, str]:
    """Its threads are the graphics processor's; the defaults are single precision."""
    return {}


def _device() -> str:
    return f"graphics through {GRAPHICS.get(sys.platform, 'Vulkan')}"
