"""A compiled program as an ONNX Runtime session with named inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from confidantd.errors import CorruptFileError, WorkerError
from confidantd.models.programs import MANIFEST_KEY

_LOAD_FAILURES = (
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
)
_RUN_FAILURES = (
    failures.Fail,
    failures.InvalidArgument,
    failures.NotImplemented,
    failures.RuntimeException,
)
_FATAL = 4  # log level: every failure is raised anyway


class EngineProgram:
    """Runs one program; all blocks of a stage share it with their own weights as inputs."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), session_options(threads), providers=["CPUExecutionProvider"]
            )
            metadata = self._session.get_modelmeta().custom_metadata_map
            manifest = json.loads(metadata[MANIFEST_KEY])
        except (*_LOAD_FAILURES, KeyError, ValueError) as failure:
            raise CorruptFileError(
                f"{path} is not a program this device can run ({_first_line(failure)})"
            ) from None
        self.name: str = manifest["program"]
        self._inputs = tuple(port["name"] for port in manifest["inputs"])
        self._outputs = [port["name"] for port in manifest["outputs"]]

    def run(self, *values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name; inputs are looked up in `values`, the first that has a name wins."""
        feeds = {name: _find(name, values) for name in self._inputs}
        try:
            found = self._session.run(self._outputs, feeds)
        except _RUN_FAILURES as failure:
            if "allocate" in str(failure):
                raise MemoryError(f"{self.name}: {_first_line(failure)}") from None
            raise WorkerError(f"program {self.name} failed: {_first_line(failure)}") from None
        return dict(zip(self._outputs, found, strict=True))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """How every session of this project runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # spinning threads starve the other stages and links of a small machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # an arena keeps 20 to 40 % more memory than is in use (100M trained weights: 1.9 against
    # 1.6 GB) and never gives it back; it would save a seventh of the backward's time
    options.enable_cpu_mem_arena = False
    return options


def _find(name: str, values: tuple[Mapping[str, NDArray[Any]], ...]) -> NDArray[Any]:
    for mapping in values:
        if name in mapping:
            return mapping[name]
    raise KeyError(name)


def _first_line(failure: Exception) -> str:
    return str(failure).strip().partition("\n")[0][:300]


def load_programs(paths: Mapping[str, Path], names: set[str], threads: int) -> Programs:
    """The programs `names`. `embedding_backward` gets one thread: it adds rows of repeated
    tokens to one place, which threads would do in a race.
    """
    missing = sorted(names - paths.keys())
    if missing:
        raise WorkerError(f"this stage was not given the program {missing[0]}")
    return {
        name: EngineProgram(paths[name], 1 if name == "embedding_backward" else threads)
        for name in sorted(names)
    }


Programs = dict[str, EngineProgram]
