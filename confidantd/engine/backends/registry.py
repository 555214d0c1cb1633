"""Which backends this installation has: the CPU's, then those of plugins."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import get_args

from confidantd.engine.backends.base import Backend, DeviceKind, first_line
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.errors import BackendError

GROUP = "confidantd.backends"


@dataclass(frozen=True, slots=True)
class Problem:
    """A backend that cannot be used, in one line, and what to do about it."""

    name: str
    message: str
    hint: str = ""


def load_backends() -> tuple[list[Backend], list[Problem]]:
    """The CPU first, then plugins by name, and the plugins that could not be loaded.

    Nothing is probed: a backend that is listed may still find no device.
    """
    backends: list[Backend] = [CpuBackend()]
    problems: list[Problem] = []
    for name in plugin_names():
        try:
            backends.append(load_backend(name))
        except BackendError as failure:
            problems.append(Problem(name, failure.message, failure.hint))
    return backends, problems


def plugin_names() -> list[str]:
    """Names of the backends that plugins bring, each once, in an order that does not change."""
    return sorted({entry.name for entry in _entries()} - {CpuBackend.name})


def load_backend(name: str) -> Backend:
    """One backend by name; BackendError if its plugin is missing or cannot be loaded."""
    if name == CpuBackend.name:
        return CpuBackend()
    for entry in _entries():
        if entry.name == name:
            return _load(entry)
    raise BackendError(f"no plugin brings the backend {name}", "see confidant doctor")


def _entries() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=GROUP)


def _load(entry: importlib.metadata.EntryPoint) -> Backend:
    try:
        backend: Backend = entry.load()()
    except Exception as failure:
        # code of others may raise anything; whoever asked goes on without this backend
        package = entry.dist.name if entry.dist else entry.value
        raise BackendError(
            f"the plugin {package} cannot be loaded "
            f"({type(failure).__name__}: {first_line(failure)})",
            f"install it again, or pip uninstall {package}",
        ) from failure
    if getattr(backend, "kind", None) not in get_args(DeviceKind):
        package = entry.dist.name if entry.dist else entry.value
        raise BackendError(
            f"the plugin {package} does not say what processor {entry.name} is on",
            f"update {package}",
        )
    return backend
