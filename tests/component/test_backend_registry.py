"""Plugins that are broken in every way: one line each, and the others go on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from confidantd.engine.backends import registry
from confidantd.engine.backends.known import PLUGINS
from confidantd.engine.backends.probing import probe_all, probe_apart
from confidantd.errors import BackendError, NoDeviceError

ROOT = Path(__file__).resolve().parents[2]

BROKEN = """
import os, signal, time
from confidantd.engine.backends.cpu import CpuBackend

class Broken(CpuBackend):
    def __init__(self, name, probe):
        self.name, self.probe = name, probe

def raise_error():
    raise ZeroDivisionError("first\\nsecond")

def die():
    os.kill(os.getpid(), signal.SIGSEGV)

def wrong_numbers():
    backend = CpuBackend()
    backend.name = "wrong"
    real = backend.session
    backend.session = lambda program, setting: Rounding(real(program, setting))
    return backend

class Rounding:
    def __init__(self, session):
        self.session = session
    def run(self, names, feeds):
        feeds = {name: value.astype("float16").astype("float32") for name, value in feeds.items()}
        return self.session.run(names, feeds)

def twin():
    backend = CpuBackend()
    backend.name = "twin"
    return backend

unusable = raise_error
raising = lambda: Broken("raising", raise_error)
crashing = lambda: Broken("crashing", die)
hanging = lambda: Broken("hanging", lambda: time.sleep(600))
"""
KINDS = ("crashing", "hanging", "raising", "twin", "unusable")


def install(folder: Path, *entries: str) -> None:
    """A distribution with these entry points; `absent` names a module that is not there."""
    (folder / "broken_plugins.py").write_text(BROKEN)
    metadata = folder / "broken_plugins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-plugins\nVersion: 1.0\n"
    )
    lines = [
        f"{name} = {'nowhere' if name == 'absent' else 'broken_plugins'}:{name}" for name in entries
    ]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where this process and those that it starts look for packages, before others."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    sys.modules.pop("broken_plugins", None)


def names_found(entries: list[dict[str, Any]]) -> set[str]:
    """Names of all entries, which are listed once each."""
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    return set(names)


def test_the_cpu_is_first_and_what_cannot_be_loaded_is_a_problem(site: Path) -> None:
    install(site, "absent", "unusable", "twin")
    backends, problems = registry.load_backends()
    names = [backend.name for backend in backends]
    assert names[0] == "cpu"
    assert "twin" in names
    assert {problem.name for problem in problems} == {"absent", "unusable"}
    for problem in problems:
        assert "\n" not in problem.message
        assert "broken-plugins" in problem.message
        assert problem.hint
    assert "ZeroDivisionError: first" in problems[1].message


def test_a_plugin_cannot_take_the_place_of_the_cpu(site: Path) -> None:
    install(site, "cpu")
    backends, _ = registry.load_backends()
    assert [type(backend).__module__ for backend in backends if backend.name == "cpu"] == [
        "confidantd.engine.backends.cpu"
    ]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absent", "the plugin broken-plugins cannot be loaded (ModuleNotFoundError: "),
        ("unusable", "the plugin broken-plugins cannot be loaded (ZeroDivisionError: first)"),
        ("raising", "it failed while it was probed (second)"),
        ("crashing", "it crashed while it was probed (SIGSEGV)"),
        ("wrong_numbers", "it does not compute in single precision"),
    ],
)
def test_a_broken_backend_is_one_line(site: Path, kind: str, said: str) -> None:
    install(site, kind)
    entry = probe_apart(kind, 1)
    assert (entry["name"], entry["present"], entry["broken"]) == (kind, False, True)
    assert said in entry["problem"]
    assert "\n" not in entry["problem"]


def test_one_that_hangs_does_not_hang_the_others(site: Path) -> None:
    install(site, *KINDS)
    entries = probe_all(1, seconds=3.0)
    assert {"cpu", *KINDS} <= names_found(entries)
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["hanging"]["problem"] == "it did not answer within 3 s and was stopped"
    assert by_name["hanging"]["broken"]


def test_a_name_that_no_plugin_has_is_reported(site: Path) -> None:
    """`--backend openvin`: a typing error shall not cost a backend in silence."""
    install(site, "twin")
    entries = probe_all(1, wanted=("openvin", "cpu", "nnapi"))
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["nnapi"]["broken"]  # asked for, and not here
    assert not by_name["coreml"]["broken"]
    assert by_name["openvin"]["broken"]
    assert by_name["openvin"]["problem"] == "no plugin brings it"
    assert by_name["openvin"]["hint"] == "did you mean openvino?"
    assert not by_name["twin"]["present"]
    assert by_name["cpu"]["present"]


def test_probing_prints_every_provider(site: Path) -> None:
    install(site, "crashing", "twin")
    command = [sys.executable, "-m", "confidantd.engine.backends.probing", "--threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ)
    )
    (line,) = done.stdout.splitlines()
    entries = json.loads(line)["backends"]
    known = {"openvino", "webgpu", "cuda", "qnn", "coreml", "nnapi", "xnnpack"}
    assert {"cpu", "crashing", "twin", *known} <= names_found(entries)
    assert entries[0]["name"] == "cpu"
    for entry in entries:
        assert set(entry) == {
            "name", "present", "broken", "version", "devices", "gflops", "memory_gbps",
            "problem", "hint",
        }  # fmt: skip
        assert entry["present"] == (entry["gflops"] is not None) == (entry["problem"] == "")
        assert all(set(device) == {"name", "kind"} for device in entry["devices"])
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["cpu"]["present"]
    assert by_name["twin"]["present"]
    assert 0.01 < by_name["cpu"]["gflops"] < 1e5
    assert 0.01 < by_name["cpu"]["memory_gbps"] < 1e5
    assert "not for this device" in by_name["nnapi"]["problem"]
    assert by_name["cuda"]["broken"] or "not installed" in by_name["cuda"]["problem"]


def plugin_entries() -> list[tuple[Path, str, str]]:
    """Folder, name and target of every entry point of the plugins in this tree."""
    found = []
    for file in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        assert project["name"] == f"confidantd-{file.parent.name}"
        entries = project["entry-points"][registry.GROUP]
        found += [(file.parent, name, target) for name, target in entries.items()]
    return found


@pytest.mark.parametrize(
    ("folder", "name", "target"), plugin_entries(), ids=lambda value: getattr(value, "name", value)
)
def test_our_plugins_load_and_say_in_one_line_what_they_lack(
    folder: Path, name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    entry = importlib.metadata.EntryPoint(name, target, registry.GROUP)
    backend = entry.load()()
    assert backend.name == name
    assert not backend.shares_host_memory
    try:
        assert backend.probe().devices
    except BackendError as failure:
        missing = failure
    else:
        return
    assert "\n" not in str(missing)
    assert missing.hint or isinstance(missing, NoDeviceError)


def test_every_plugin_is_known_to_those_who_lack_it() -> None:
    folders = {folder.name for folder, _, _ in plugin_entries()}
    assert {plugin.name for plugin in PLUGINS} == folders
    for plugin in PLUGINS:
        assert plugin.install() == f"pip install {ROOT / 'plugins' / plugin.name}"
