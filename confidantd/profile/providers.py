"""What the probe of this device said about each execution provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ProviderDevice:
    """A processor that a provider runs on; `kind` is "cpu", "gpu" or "npu"."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider that is installed or could be.

    Neither `present` nor `broken`: not installed, or without a processor to run on;
    `problem` says which and `hint` what to do. `memory_gbps` is None where it tells nothing.
    """

    name: str
    present: bool
    broken: bool
    version: str | None
    devices: tuple[ProviderDevice, ...]
    gflops: float | None
    memory_gbps: float | None
    problem: str
    hint: str

    def to_json(self) -> dict[str, Any]:
        """As in `confidant doctor --json` and in the file that remembers it."""
        return asdict(self)


def read_providers(entries: Iterable[Mapping[str, Any]]) -> tuple[Provider, ...]:
    """From what the probe printed; raises KeyError, TypeError or ValueError."""
    return tuple(_provider(entry) for entry in entries)


def _provider(entry: Mapping[str, Any]) -> Provider:
    return Provider(
        name=str(entry["name"]),
        present=bool(entry["present"]),
        broken=bool(entry["broken"]),
        version=None if entry["version"] is None else str(entry["version"]),
        devices=tuple(ProviderDevice(str(d["name"]), str(d["kind"])) for d in entry["devices"]),
        gflops=_number(entry["gflops"]),
        memory_gbps=_number(entry["memory_gbps"]),
        problem=str(entry["problem"]),
        hint=str(entry["hint"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def present_names(providers: Iterable[Provider]) -> tuple[str, ...]:
    """Backends that a job may use here, the CPU first."""
    names = [provider.name for provider in providers if provider.present]
    return tuple(sorted(names, key=lambda name: name != "cpu"))


def cpu_gflops(providers: Iterable[Provider]) -> float:
    """The CPU's speed, what devices are compared by; 0.0 if it is not known."""
    return next((p.gflops or 0.0 for p in providers if p.name == "cpu"), 0.0)
