"""A compiled program as an ONNX Runtime session with named inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from confidantd.engine.backends.base import (
    RUN_FAILURES,
    Backend,
    SessionSetting,
    first_line,
)
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.program_check import check_program
from confidantd.errors import BackendError, CorruptFileError, WorkerError
from confidantd.models.manifest import MANIFEST_KEY, Manifest, read_manifest

Array = NDArray[Any]


class EngineProgram:
    """Runs one program; all blocks of a stage share it with their own weights as inputs.

    On a backend that shares the host's memory, arrays are read and written in place.
    """

    def __init__(self, path: Path, backend: Backend, setting: SessionSetting) -> None:
        self._session = _session(backend, path, setting)
        self._backend = backend
        manifest = _manifest(path, self._session)
        self.name = manifest.program
        self.inputs = tuple(port.name for port in manifest.inputs)
        self.outputs = tuple(port.name for port in manifest.outputs)
        shapes = {value.name: value.shape for value in self._session.get_outputs()}
        self._shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in shapes.items() if _is_known(shape)
        }
        ranks = {value.name: value.shape for value in self._session.get_inputs()}
        self._input_shapes = {n: tuple(s) for n, s in ranks.items() if _is_known(s)}

    def run(
        self,
        *values: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        only: tuple[str, ...] | None = None,
    ) -> dict[str, Array]:
        """Outputs by name (all, or `only` some).

        Inputs are looked up in `values`, the first that has a name wins; their shape may
        be another view of the same elements. Outputs named in `into` are written there.
        """
        feeds = {name: self._shaped(name, _find(name, values)) for name in self.inputs}
        names = self.outputs if only is None else only
        into = {} if into is None else into
        try:
            if self._backend.shares_host_memory and all(name in self._shapes for name in names):
                return self._run_bound(feeds, names, into)
            found = self._session.run(list(names), feeds)
        except RUN_FAILURES as failure:
            raise self._failed(failure) from None
        outputs = dict(zip(names, found, strict=True))
        for name, array in into.items():
            array.reshape(-1)[...] = outputs[name].reshape(-1)
            outputs[name] = array
        return outputs

    def _shaped(self, name: str, array: Array) -> Array:
        shape = self._input_shapes.get(name)
        return array if shape is None or array.shape == shape else array.reshape(shape)

    def _run_bound(
        self, feeds: Mapping[str, Array], names: tuple[str, ...], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run on the arrays themselves: nothing is copied in or out."""
        binding = self._session.io_binding()
        held = []  # contiguous copies must outlive the run
        for name, given in feeds.items():
            array = np.ascontiguousarray(given)
            held.append(array)
            binding.bind_input(name, "cpu", 0, array.dtype.type, given.shape, array.ctypes.data)
        outputs = {}
        for name in names:
            array = into[name] if name in into else np.empty(self._shapes[name], np.float32)
            outputs[name] = array
            shape = self._shapes[name]
            binding.bind_output(name, "cpu", 0, np.float32, shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return outputs

    def _failed(self, failure: Exception) -> Exception:
        reason = first_line(failure)
        if self._backend.name != CpuBackend.name:  # out of its memory, too: the CPU can go on
            return BackendError(f"{self._backend.name} failed in {self.name}: {reason}")
        if "allocate" in str(failure) or "bad_alloc" in str(failure):
            return MemoryError(f"{self.name}: {reason}")
        return WorkerError(f"program {self.name} failed: {reason}")


def _session(backend: Backend, path: Path, setting: SessionSetting) -> onnxruntime.InferenceSession:
    check_program(path)
    if backend.name == CpuBackend.name:
        return backend.session(path, setting)
    try:
        return backend.session(path, setting)
    except BackendError:
        raise
    except Exception as failure:  # code of a plugin: it may raise anything
        raise BackendError(
            f"{backend.name} cannot run {path.name} ({first_line(failure)})"
        ) from failure


def _manifest(path: Path, session: onnxruntime.InferenceSession) -> Manifest:
    try:
        return read_manifest(session.get_modelmeta().custom_metadata_map[MANIFEST_KEY])
    except (KeyError, ValueError) as failure:
        raise CorruptFileError(
            f"{path} is not a program this device can run ({first_line(failure)})"
        ) from None


@functools.cache
def free_dimensions(path: Path) -> frozenset[str]:
    """Names of the sizes that a program leaves open."""
    check_program(path)
    session = CpuBackend().session(path, SessionSetting(optimize=False))
    return _manifest(path, session).free_dimensions


def fixed_dimensions(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of a program's free dimensions, which are called `K` or `64*K`."""
    if not sizes:
        return {}
    found = {}
    for name in free_dimensions(path):
        factor, _, base = name.rpartition("*")
        if base in sizes:
            found[name] = int(factor or 1) * sizes[base]
    return found


def _is_known(shape: Any) -> bool:
    return all(isinstance(size, int) for size in shape)


def _find(name: str, values: tuple[Mapping[str, Array], ...]) -> Array:
    for mapping in values:
        if name in mapping:
            return mapping[name]
    raise KeyError(name)


Programs = dict[str, EngineProgram]


def load_programs(
    paths: Mapping[str, Path],
    names: set[str],
    threads: int,
    backend: Backend | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Programs:
    """The programs `names`, on the CPU unless another backend is given.

    `sizes` fixes free dimensions.
    """
    missing = sorted(names - paths.keys())
    if missing:
        raise WorkerError(f"this stage was not given the program {missing[0]}")
    found = backend or CpuBackend()
    return {
        name: EngineProgram(
            paths[name],
            found,
            SessionSetting(threads, fixed_dimensions(paths[name], sizes or {})),
        )
        for name in sorted(names)
    }
