"""A Python of its own that computes on WebGPU, by the software Vulkan driver of chromium.

`make test` makes it where that driver is installed. It has onnxruntime-webgpu, numpy and
the webgpu plugin; this package and the tests are found beside it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-webgpu" / "bin" / "python"
DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
RUN_SECONDS = 120.0  # a product of 256 x 256 takes 40 ms on it, a session half a second
ADAPTER = """
import json
from confidantd.engine.backends.registry import load_backend
print(json.dumps([device.name for device in load_backend("webgpu").probe().devices]))
"""


@dataclass(frozen=True, slots=True)
class WebGpu:
    """How to run something there: `[python, ...]` with `environment`."""

    python: str
    environment: dict[str, str]

    def run(self, code: str, *arguments: str) -> Any:
        """Run a program text; gives the JSON that it prints last."""
        return self._run("-c", code, *arguments)

    def run_module(self, module: str, *arguments: str) -> Any:
        """Run `python -m module`; gives the JSON that it prints last."""
        return self._run("-m", module, *arguments)

    def _run(self, *arguments: str) -> Any:
        done = subprocess.run(
            [self.python, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-4000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])


def need_webgpu() -> WebGpu:
    """The environment; skips the test where there is none, and in CI fails it."""
    found = _find()
    if isinstance(found, WebGpu):
        return found
    if os.environ.get("CONFIDANT_REQUIRE_WEBGPU") == "1":
        pytest.fail(f"WebGPU is required here: {found}", pytrace=False)
    pytest.skip(found)


@functools.cache
def _find() -> WebGpu | str:
    """The environment, proved to compute; or why there is none."""
    if not DRIVER.exists():
        return f"no software Vulkan driver at {DRIVER} (Debian: chromium-common)"
    if not PYTHON.exists():
        return f"no {PYTHON} (make test makes it)"
    found = WebGpu(str(PYTHON), _environment())
    try:
        found.run(ADAPTER)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return f"WebGPU does not work here: {str(failure).strip().splitlines()[-1]}"
    return found


def _environment() -> dict[str, str]:
    """Chromium brings the Vulkan loader along with the driver."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VK_DRIVER_FILES": str(DRIVER),
        "LD_LIBRARY_PATH": str(DRIVER.parent),
        "OMP_NUM_THREADS": "1",
    }
