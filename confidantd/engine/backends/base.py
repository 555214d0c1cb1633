"""What a backend is, and what all of them share: options, and failures in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from confidantd.errors import BackendError

LOAD_FAILURES = (
    failures.EPFail,
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
    RuntimeError,  # what a provider throws without a status
)
RUN_FAILURES = (
    failures.EPFail,
    failures.Fail,
    failures.InvalidArgument,
    failures.NotImplemented,
    failures.RuntimeException,
    RuntimeError,  # what a provider throws without a status
)
MAX_REASON_CHARACTERS = 300
_CPU = "CPUExecutionProvider"
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")  # says nothing to a person,
_PLACE = re.compile(r"^/\S*:\d+ .* was false\. ")  # nor does a place in its sources
_FATAL = 4  # log level: every failure is raised anyway

DeviceKind = Literal["cpu", "gpu", "npu"]
# How much of a program a provider must take itself. What it leaves runs on ONNX Runtime's CPU
# provider, on cores that another backend counts on, so a silent rest is an error:
# "whole" for a provider that speaks every operator of our programs; "products" where small
# nodes on shapes stay on the CPU by design; "some" where a provider is made to take only part.
Coverage = Literal["whole", "products", "some"]
PRODUCTS = {
    "Attention", "FusedGemm", "FusedMatMul", "Gemm", "GroupQueryAttention", "MatMul",
    "MatMulInteger", "MatMulNBits", "MultiHeadAttention",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BackendDevice:
    """A processor as its driver names it."""

    name: str
    kind: DeviceKind


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend found: its provider's version, and devices, that in use first."""

    version: str
    devices: tuple[BackendDevice, ...]


@dataclass(frozen=True, slots=True)
class SessionSetting:
    """How a session shall run; `dimensions` fixes free dimensions by name, which folds more.

    Without `optimize` it is made faster and runs slower.
    """

    threads: int = 1
    dimensions: Mapping[str, int] = field(default_factory=dict)
    optimize: bool = True


class Backend(Protocol):
    """One execution provider on one kind of processor.

    Sessions of one backend are made and run by one thread at a time: WebGPU's share a
    command queue, and two that run at once crash. Several backends run at once.
    `kind`: what processor it is on. `shares_host_memory`: sessions read and write numpy
    arrays in place, so that a bound input may change between runs.
    """

    name: str
    kind: DeviceKind
    shares_host_memory: bool

    def probe(self) -> Probe:
        """What is here; raises BackendError: why it cannot be used, and what to install."""
        ...

    def session(self, program: Path, setting: SessionSetting) -> onnxruntime.InferenceSession:
        """A session that runs the program; raises BackendError where it cannot."""
        ...


def base_options(setting: SessionSetting) -> onnxruntime.SessionOptions:
    """What holds for every session of this project."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if setting.optimize else levels.ORT_DISABLE_ALL
    )
    # spinning threads starve the other backends, stages and links of a small machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, size in setting.dimensions.items():
        options.add_free_dimension_override_by_name(name, size)
    return options


def provider_options(setting: SessionSetting, coverage: Coverage) -> onnxruntime.SessionOptions:
    """`base_options` for another provider than the CPU's, whose share is checked."""
    options = base_options(setting)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if coverage == "whole":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def open_session(
    backend: str, program: Path, options: onnxruntime.SessionOptions, **providers: Any
) -> onnxruntime.InferenceSession:
    """A session, or BackendError in one line; never one of another provider than asked for."""
    try:
        # without this, ONNX Runtime prints a failure and quietly runs everything on the CPU
        return onnxruntime.InferenceSession(str(program), options, enable_fallback=0, **providers)
    except (*LOAD_FAILURES, ValueError) as failure:
        raise BackendError(
            f"the backend {backend} cannot run {program.name} ({first_line(failure)})"
        ) from None


def check_share(
    backend: str, session: onnxruntime.InferenceSession, provider: str, coverage: Coverage
) -> None:
    """BackendError if `provider` did not take what `coverage` asks of it.

    "whole" is what ONNX Runtime itself enforces, with the option set above. Releases that
    do not tell who took a node are believed about the products.
    """
    if provider not in session.get_providers():
        raise BackendError(f"the backend {backend} did not take part in its own session")
    if coverage == "products" and hasattr(session, "get_provider_graph_assignment_info"):
        parts = session.get_provider_graph_assignment_info()
        left = {node.op_type for part in parts if part.ep_name == _CPU for node in part.get_nodes()}
        if left & PRODUCTS:
            named = ", ".join(sorted(left & PRODUCTS))
            raise BackendError(f"the backend {backend} leaves {named} to the CPU")


def first_line(failure: Exception) -> str:
    """What a failure says first, short enough for a message."""
    line = str(failure).strip().partition("\n")[0]
    return _PLACE.sub("", _STATUS.sub("", line))[:MAX_REASON_CHARACTERS]
