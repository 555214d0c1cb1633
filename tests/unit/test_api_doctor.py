"""What `confidant doctor` says about execution providers."""

from __future__ import annotations

import importlib.metadata

import pytest

from confidantd.api.views import _check_onnxruntime, _check_providers
from confidantd.profile.providers import Provider, ProviderDevice, cpu_gflops, present_names

CPU = Provider(
    "cpu", True, False, "1.32.0", (ProviderDevice("Core i5", "cpu"),), 83.21, 12.0, "", ""
)
GPU = Provider("webgpu", True, False, "0.4.0", (ProviderDevice("Iris", "gpu"),), 0.46, None, "", "")
BROKEN = Provider("cuda", False, True, None, (), None, None, "it has no driver", "install it")
ABSENT = Provider("qnn", False, False, None, (), None, None, "not installed", "pip install x")


def test_before_they_are_probed() -> None:
    (check,) = _check_providers(())
    assert (check["name"], check["state"]) == ("provider cpu", "warn")


def test_each_provider_is_one_line_those_that_compute_first() -> None:
    checks = _check_providers((ABSENT, BROKEN, CPU, GPU))
    assert [(check["name"], check["state"]) for check in checks] == [
        ("provider cpu", "ok"),
        ("provider webgpu", "ok"),
        ("provider cuda", "warn"),
        ("provider qnn", "none"),
    ]
    said = "Core i5, 83.2 GFLOP/s (float32 matrix product), version 1.32.0"
    assert checks[0]["message"] == said
    assert (checks[2]["message"], checks[2]["hint"]) == ("it has no driver", "install it")
    assert checks[3]["hint"] == "pip install x"


def test_only_what_is_present_is_offered_the_cpu_first() -> None:
    assert present_names((GPU, BROKEN, CPU, ABSENT)) == ("cpu", "webgpu")
    assert cpu_gflops((GPU, CPU)) == 83.21
    assert cpu_gflops((BROKEN,)) == 0.0


@pytest.mark.parametrize(
    ("installed", "state", "said"),
    [
        ((), "fail", "not installed"),
        (("onnxruntime",), "ok", "version 1.9 (onnxruntime)"),
        (("onnxruntime-openvino",), "ok", "version 1.9 (onnxruntime-openvino)"),
        (("onnxruntime", "onnxruntime-gpu"), "warn", "overwrite each other"),
    ],
)
def test_one_build_of_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], state: str, said: str
) -> None:
    """All builds fill the same folder, so two of them are a broken one."""

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = _check_onnxruntime()
    assert check["state"] == state
    assert said in check["message"]
    if state == "warn":
        assert "pip uninstall onnxruntime onnxruntime-gpu" in check["hint"]
