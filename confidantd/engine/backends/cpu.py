"""ONNX Runtime's own CPU provider: built in, always there, what others are compared with."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from confidantd.engine.backends.base import (
    LOAD_FAILURES,
    BackendDevice,
    DeviceKind,
    Probe,
    SessionSetting,
    base_options,
    first_line,
)
from confidantd.errors import BackendError, CorruptFileError

PROVIDER = "CPUExecutionProvider"
# Makes a Transpose and a MatMul one FusedMatMul, which MLAS multiplies 12 to 18 % slower.
DISABLED_OPTIMIZERS = ["MatmulTransposeFusion"]
# The file is sound, but this release has no such operator, or not for these types.
_UNSUPPORTED = (
    "No Op registered",
    "is not a registered function",
    "Could not find an impl",
    "Exception during initialization",
)


class CpuBackend:
    """The CPU provider with a share of the cores."""

    name = "cpu"
    kind: DeviceKind = "cpu"
    shares_host_memory = True

    def probe(self) -> Probe:
        """Always there."""
        return Probe(onnxruntime.__version__, (BackendDevice(processor_name(), "cpu"),))

    def session(self, program: Path, setting: SessionSetting) -> onnxruntime.InferenceSession:
        """Raises CorruptFileError for a broken file, BackendError for an unsupported operator,
        MemoryError where there is none left.
        """
        return _session(str(program), program.name, _options(setting))

    def written_session(
        self, program: bytes, weights: Mapping[str, NDArray[Any]], setting: SessionSetting
    ) -> onnxruntime.InferenceSession:
        """A session of a program that this process wrote, with copies of these weights. Raises as
        `session` does.
        """
        options = _options(setting)
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        return _session(program, "the program of a stage", options)


def _options(setting: SessionSetting) -> onnxruntime.SessionOptions:
    _share_arena()
    options = base_options(setting)
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A pattern is one piece of memory for a whole run beside the pieces of the first run,
    # which the arena keeps: twice the memory, and no run is faster for it.
    options.enable_mem_pattern = False
    return options


def _session(
    program: str | bytes, name: str, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(
            program,
            options,
            providers=[PROVIDER],
            disabled_optimizers=DISABLED_OPTIMIZERS,
            enable_fallback=0,
        )
    except (*LOAD_FAILURES, ValueError) as failure:
        raise _translated(name, failure) from None


@functools.cache
def _share_arena() -> None:
    """One arena for all sessions of this process: backends that run at once share it, too.

    Without an arena, the backward of a block takes an eighth longer (fresh pages for every
    intermediate tensor); with one for each session, each keeps what only one needs at a time.
    """
    place = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    # Growing by powers of two leaves large regions to cut from: a stage that recomputes takes 5 to
    # 20 MB less than where the arena grows by exactly what is asked for.
    growth = {"arena_extend_strategy": 0}
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(growth))


def _translated(name: str, failure: Exception) -> Exception:
    reason = first_line(failure)
    if "bad_alloc" in reason or "allocate" in reason:
        return MemoryError(f"{name}: {reason}")
    if isinstance(failure, failures.NotImplemented) or any(part in reason for part in _UNSUPPORTED):
        return BackendError(
            f"the backend cpu cannot run {name} ({reason})",
            f"update onnxruntime, here {onnxruntime.__version__}",
        )
    return CorruptFileError(f"{name} is not a program this device can run ({reason})")


@functools.cache
def processor_name() -> str:
    """The processor's name; boards and Android tell it in other fields than laptops."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = dict(_field(line) for line in lines)
    named = fields.get("model name") or fields.get("Hardware") or fields.get("Model")
    return named or platform.processor() or platform.machine() or "CPU"


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
