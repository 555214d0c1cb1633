"""What `confidant doctor` says about execution providers, links and readiness."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest

from confidantd.api.checks import check_links, check_readiness
from confidantd.api.views import _check_onnxruntime, _check_providers
from confidantd.ids import DeviceId
from confidantd.profile.providers import Provider, ProviderDevice, cpu_gflops, present_names
from confidantd.swarm.state import PeerView
from confidantd.wire.links import Link
from tests.component.swarm_support import resources

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


def seen(name: str, links: dict[str, float | None]) -> PeerView:
    """A device that is alive, with its measured links by name."""
    found = {DeviceId(other * 64): Link(mbps, 2.0) for other, mbps in links.items()}
    return PeerView(DeviceId(name * 64), name, "alive", "", 1.0, None, False, links=found)


def test_the_slowest_link_and_pairs_that_nobody_measured() -> None:
    a, b, c = seen("a", {"b": 90.0, "c": 60.0}), seen("b", {"a": 18.24}), seen("c", {"b": 300.0})
    (check,) = check_links([a, b, c])
    assert (check["name"], check["state"]) == ("links", "ok")
    assert check["message"] == "the slowest is between a and b: 18.2 Mbit/s"
    (check,) = check_links([a, b, seen("c", {"b": None})])
    assert check["state"] == "warn"
    assert check["message"].endswith("18.2 Mbit/s; not measured yet: b and c")
    (check,) = check_links([seen(name, {}) for name in "abcd"])
    assert check["message"] == "none is measured yet"
    assert check_links([a]) == []


def test_whether_this_device_takes_work() -> None:
    here = resources(1)
    assert check_readiness(here)["message"] == "this device takes it"
    phone = replace(here, charging=False, battery_percent=12.4, temperature_celsius=38.6)
    said = check_readiness(phone)
    assert said["state"] == "ok"
    assert said["message"] == "this device takes it; battery at 12 %, not charging, 39 °C"
    said = check_readiness(replace(phone, refuses="its battery is at 12 %"))
    assert said["state"] == "warn"
    assert said["message"].startswith("this device takes none: its battery is at 12 %; battery at")
    assert "config.toml" in said["hint"]
