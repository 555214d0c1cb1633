"""What every backend must do, as checks that run wherever its provider is installed.

`python -m tests.component.backend_contract NAME FOLDER` runs them all and prints
`{check: error or null}`; FOLDER holds the programs that `write_programs` makes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from confidantd.engine.backends.base import RUN_FAILURES, Backend, SessionSetting
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.backends.registry import load_backend
from confidantd.engine.backends.speed import measure
from confidantd.engine.onnx_bytes import matmul_model
from confidantd.errors import BackendError, ConfidantError, CorruptFileError

Check = Callable[[Backend, Path], None]

KINDS = ("cpu", "gpu", "npu")
UNSUPPORTED = ("unknown", "double", "text")  # each is refused by some backends, "unknown" by all
CPU_SHARE = 1.4  # seconds of processor time in a second: below 2, what two threads would use


def write_programs(folder: Path) -> None:
    """The programs that the checks use; needs the onnx package."""
    import onnx

    (folder / "matmul.onnx").write_bytes(matmul_model())
    (folder / "corrupt.onnx").write_bytes(matmul_model()[:-20])
    for name, operator, kind in (
        ("unknown", "NoSuchOperator", onnx.TensorProto.FLOAT),
        ("double", "Erf", onnx.TensorProto.DOUBLE),
        ("text", "StringNormalizer", onnx.TensorProto.STRING),
    ):
        x, y = (onnx.helper.make_tensor_value_info(port, kind, [4]) for port in "xy")
        node = onnx.helper.make_node(operator, ["x"], ["y"])
        graph = onnx.helper.make_graph([node], name, [x], [y])
        opset = onnx.helper.make_opsetid("", 20)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def says_what_is_here(backend: Backend, _folder: Path) -> None:
    found = backend.probe()
    assert found.version[0].isdigit()
    assert found.devices
    assert all(device.name and device.kind in KINDS for device in found.devices)


def multiplies_as_numpy_does(backend: Backend, folder: Path) -> None:
    session = _session(backend, folder)
    for rows, inner, columns in ((1, 1, 1), (3, 5, 7), (16, 64, 48)):
        _check_product(session, rows, inner, columns)


def takes_a_size_for_a_free_dimension(backend: Backend, folder: Path) -> None:
    sizes = {"a0": 6, "a1": 8, "b0": 8, "b1": 5}
    session = backend.session(folder / "matmul.onnx", SessionSetting(1, sizes))
    assert [port.shape for port in session.get_inputs()] == [[6, 8], [8, 5]]
    _check_product(session, 6, 8, 5)


def keeps_to_one_thread(backend: Backend, folder: Path) -> None:
    if backend.probe().devices[0].kind != "cpu":
        return  # threads of a graphics processor are its driver's
    session = _session(backend, folder)
    a = np.ones((512, 512), np.float32)
    session.run(None, {"a": a, "b": a})
    started, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < 0.3:
        session.run(None, {"a": a, "b": a})
    share = (time.process_time() - used) / (time.perf_counter() - started)
    assert share < CPU_SHARE, share


def leaves_a_pinned_thread_on_its_core(backend: Backend, folder: Path) -> None:
    """The last core, since a provider that pins by itself takes the first."""
    core = {max(os.sched_getaffinity(0))}

    def work() -> set[int]:
        os.sched_setaffinity(0, core)
        _check_products(_session(backend, folder))
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == core


def says_that_a_program_is_corrupt(backend: Backend, folder: Path) -> None:
    expected = CorruptFileError if backend.name == "cpu" else BackendError
    for name in ("corrupt", "absent"):
        assert type(_refusal(backend, folder / f"{name}.onnx")) is expected


def refuses_what_it_cannot_compute(backend: Backend, folder: Path) -> None:
    found = {name: _refusal(backend, folder / f"{name}.onnx") for name in UNSUPPORTED}
    refused = {name: type(failure) for name, failure in found.items() if failure is not None}
    assert set(refused.values()) == {BackendError}
    assert "unknown" in refused
    assert len(refused) >= 2, refused


def reads_bound_memory_in_place_where_it_says_so(backend: Backend, folder: Path) -> None:
    if not backend.shares_host_memory:
        return
    session = _session(backend, folder)
    a, c = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    binding = session.io_binding()
    for name in ("a", "b"):
        binding.bind_input(name, "cpu", 0, np.float32, a.shape, a.ctypes.data)
    binding.bind_output("c", "cpu", 0, np.float32, c.shape, c.ctypes.data)
    session.run_with_iobinding(binding)
    assert (c == 2).all()
    a[...] = 3
    session.run_with_iobinding(binding)
    assert (c == 18).all()


def runs_beside_the_cpu_backend(backend: Backend, folder: Path) -> None:
    """Each in a thread of its own, as the parts of a split block do."""
    sessions = [_session(each, folder) for each in (backend, CpuBackend())]
    with ThreadPoolExecutor(len(sessions)) as pool:
        for done in [pool.submit(_check_products, session) for session in sessions]:
            done.result()


def has_a_speed(backend: Backend, _folder: Path) -> None:
    speed = measure(backend, 1)
    assert 0.01 < speed.gflops < 1e6
    assert (speed.memory_gbps is not None) == backend.shares_host_memory


CHECKS: tuple[Check, ...] = (
    says_what_is_here,
    multiplies_as_numpy_does,
    takes_a_size_for_a_free_dimension,
    keeps_to_one_thread,
    leaves_a_pinned_thread_on_its_core,
    says_that_a_program_is_corrupt,
    refuses_what_it_cannot_compute,
    reads_bound_memory_in_place_where_it_says_so,
    runs_beside_the_cpu_backend,
    has_a_speed,
)


def run_checks(name: str, folder: Path) -> dict[str, str | None]:
    """Every check on a backend: None, or what went wrong."""
    backend = load_backend(name)
    return {check.__name__: _outcome(check, backend, folder) for check in CHECKS}


def _outcome(check: Check, backend: Backend, folder: Path) -> str | None:
    try:
        check(backend, folder)
    except (AssertionError, ConfidantError, *RUN_FAILURES):
        return traceback.format_exc()
    return None


def _session(backend: Backend, folder: Path) -> onnxruntime.InferenceSession:
    return backend.session(folder / "matmul.onnx", SessionSetting(1))


def _check_products(session: onnxruntime.InferenceSession) -> None:
    for _ in range(10):
        _check_product(session, 8, 64, 32)


def _check_product(
    session: onnxruntime.InferenceSession, rows: int, inner: int, columns: int
) -> None:
    random = np.random.default_rng(rows)
    a = random.normal(size=(rows, inner)).astype(np.float32)
    b = random.normal(size=(inner, columns)).astype(np.float32)
    (found,) = session.run(None, {"a": a, "b": b})
    np.testing.assert_allclose(found, a @ b, rtol=1e-5, atol=1e-5)


def _refusal(backend: Backend, program: Path) -> ConfidantError | None:
    """Why the backend refuses a program, said in one line; None if it takes it."""
    try:
        backend.session(program, SessionSetting(1))
    except (BackendError, CorruptFileError) as failure:
        found: ConfidantError = failure
    else:
        return None
    assert "\n" not in str(found)
    assert program.name in str(found)
    return found


if __name__ == "__main__":
    print(json.dumps(run_checks(sys.argv[1], Path(sys.argv[2]))))
