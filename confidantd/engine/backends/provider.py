"""Providers that a build of onnxruntime has in itself and offers by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from confidantd.engine.backends.base import (
    BackendDevice,
    Coverage,
    DeviceKind,
    Probe,
    SessionSetting,
    check_share,
    open_session,
    provider_options,
)
from confidantd.engine.onnx_bytes import matmul_model
from confidantd.errors import BackendError, NoDeviceError

_NOTHING_TAKEN = "assigned to the default CPU EP"
Options = Callable[[SessionSetting], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider's name, the first release that has what we need of it, and how to get it."""

    name: str
    minimum: str
    install: str


class ProviderBackend:
    """A provider of the installed build on one kind of processor.

    `options` gives the provider's own options for a setting; `device` what the processor
    is called, which these providers do not tell.
    """

    def __init__(
        self,
        name: str,
        provider: Provider,
        kind: DeviceKind,
        options: Options,
        device: Callable[[], str],
        *,
        coverage: Coverage = "whole",
        broken_hint: str = "",
    ) -> None:
        self.name = name
        self.shares_host_memory = False
        self._provider = provider
        self.kind = kind
        self._options = options
        self._device = device
        self._coverage = coverage
        self._broken_hint = broken_hint

    def probe(self) -> Probe:
        """Opens a small session: a build lists its providers even where no driver is.

        NoDeviceError where the provider takes nothing of it, not even a matrix product.
        """
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "probe.onnx"
            program.write_bytes(matmul_model())
            try:
                self.session(program, SessionSetting())
            except BackendError as failure:
                if _NOTHING_TAKEN not in failure.message:
                    raise
                message = f"{self._provider.name} finds no {self.kind.upper()} here"
                raise NoDeviceError(message, failure.hint) from None
        return Probe(onnxruntime.__version__, (BackendDevice(self._device(), self.kind),))

    def session(self, program: Path, setting: SessionSetting) -> onnxruntime.InferenceSession:
        """Raises BackendError if the build, the driver or the program does not work."""
        self._check_build()
        name = self._provider.name
        options = provider_options(setting, self._coverage)
        providers = [(name, dict(self._options(setting)))]
        try:
            session = open_session(self.name, program, options, providers=providers)
            check_share(self.name, session, name, self._coverage)
        except BackendError as failure:
            raise BackendError(failure.message, self._broken_hint) from None
        return session

    def _check_build(self) -> None:
        here = onnxruntime.__version__
        if self._provider.name not in onnxruntime.get_available_providers():
            message = f"this build of onnxruntime {here} has no {self._provider.name}"
            raise BackendError(message, self._provider.install)
        if _release(here) < _release(self._provider.minimum):
            message = (
                f"{self._provider.name} needs onnxruntime {self._provider.minimum}, not {here}"
            )
            raise BackendError(message, self._provider.install)


def _release(version: str) -> tuple[int, ...]:
    """`1.23.2` as (1, 23); what stands behind has no say."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
