"""One contract, every backend that is here: in this process, WebGPU in its own environment."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from confidantd.engine.backends.registry import load_backend, plugin_names
from confidantd.errors import NoDeviceError
from tests.component.backend_contract import CHECKS, run_checks, write_programs
from tests.openvino_backend import need_openvino
from tests.webgpu_environment import need_webgpu

BACKENDS = sorted({"cpu", "openvino", "webgpu", *plugin_names()})


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs that the checks use."""
    folder = tmp_path_factory.mktemp("programs")
    write_programs(folder)
    return folder


@cache
def outcomes(name: str, folder: Path) -> dict[str, str | None]:
    """All checks on a backend, run once."""
    if name == "webgpu":
        found: dict[str, str | None] = need_webgpu().run_module(
            "tests.component.backend_contract", name, str(folder)
        )
        return found
    if name == "openvino":
        need_openvino()
    try:
        load_backend(name).probe()
    except NoDeviceError as failure:
        pytest.skip(failure.message)
    return run_checks(name, folder)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("name", BACKENDS)
def test_contract(name: str, check: str, programs: Path) -> None:
    error = outcomes(name, programs)[check]
    assert error is None, error
