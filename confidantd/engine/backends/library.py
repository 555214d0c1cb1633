"""Providers that come as a package of their own, `onnxruntime-ep-*`, for plain onnxruntime."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from confidantd.engine.backends.base import (
    LOAD_FAILURES,
    BackendDevice,
    Coverage,
    DeviceKind,
    Probe,
    SessionSetting,
    check_share,
    first_line,
    open_session,
    provider_options,
)
from confidantd.errors import BackendError, NoDeviceError

MINIMUM = "1.23.1"  # the first onnxruntime whose Python package can load such libraries
_loading = threading.Lock()  # each backend makes its sessions in a thread of its own


@dataclass(frozen=True, slots=True)
class Library:
    """A package with a provider: its module, its distribution, and the provider's name."""

    module: str
    package: str
    provider: str


class LibraryBackend:
    """The devices of one kind that a provider library offers; sessions use the first.

    `options` gives the provider's own options for a setting.
    """

    def __init__(
        self,
        name: str,
        library: Library,
        kind: DeviceKind,
        options: Callable[[SessionSetting], Mapping[str, str]],
        *,
        coverage: Coverage = "whole",
        absent_hint: str = "",
    ) -> None:
        self.name = name
        self.shares_host_memory = False
        self._library = library
        self.kind = kind
        self._options = options
        self._coverage = coverage
        self._absent_hint = absent_hint

    def probe(self) -> Probe:
        """Loads the library into this process; raises NoDeviceError if none is there."""
        devices = tuple(BackendDevice(_device_name(d), self.kind) for d in self._devices())
        return Probe(importlib.metadata.version(self._library.package), devices)

    def session(self, program: Path, setting: SessionSetting) -> onnxruntime.InferenceSession:
        """Raises BackendError if the library, the device or the program does not work."""
        devices = self._devices()
        options = provider_options(setting, self._coverage)
        options.add_provider_for_devices(devices[:1], dict(self._options(setting)))
        session = open_session(self.name, program, options)
        check_share(self.name, session, self._library.provider, self._coverage)
        return session

    def _devices(self) -> list[Any]:
        with _loading:
            _load(self._library)
        kind = getattr(onnxruntime.OrtHardwareDeviceType, self.kind.upper())
        found = [
            device
            for device in onnxruntime.get_ep_devices()
            # a meta device that spreads work by itself has another name: PROVIDER.AUTO
            if device.ep_name == self._library.provider and device.device.type == kind
        ]
        if not found:
            raise NoDeviceError(
                f"{self._library.package} finds no {self.kind.upper()} here", self._absent_hint
            )
        return found


@functools.cache
def _load(library: Library) -> None:
    """Make the provider known, once per process: ONNX Runtime refuses a second time."""
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} cannot load {library.package}",
            f'pip install "onnxruntime>={MINIMUM}"',
        )
    try:
        module = importlib.import_module(library.module)
        path = module.get_library_path()
        onnxruntime.register_execution_provider_library(library.provider, path)
    except ImportError:
        raise BackendError(
            f"{library.package} is not installed", f"pip install {library.package}"
        ) from None
    except (*LOAD_FAILURES, OSError) as failure:
        raise BackendError(
            f"{library.package} cannot be loaded ({first_line(failure)})",
            f"pip install --force-reinstall {library.package}",
        ) from None


def _device_name(device: Any) -> str:
    """As the provider names it, else as the system does."""
    named = device.ep_metadata.get("FULL_DEVICE_NAME")
    return str(named or device.device.metadata.get("Description") or device.device.vendor)
