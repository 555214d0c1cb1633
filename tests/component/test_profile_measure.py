"""What this device can compute: really probed once, remembered, nothing where that fails."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import pytest

from confidantd.profile import measure
from confidantd.profile.measure import measure_backends
from confidantd.profile.providers import cpu_gflops, present_names
from tests.component.net_support import until

ENTRY = {
    "name": "cpu", "present": True, "broken": False, "version": "1.2", "devices": [],
    "gflops": 123.0, "memory_gbps": None, "problem": "", "hint": "",
}  # fmt: skip
NOT_TWICE = "import sys; sys.exit(1)"


def fake_probe(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    """Another program in the place of the one that probes."""
    (folder / "fake_probe.py").write_text(program)
    monkeypatch.setattr(measure, "MODULE", "fake_probe")
    monkeypatch.setenv("PYTHONPATH", str(folder))


async def test_probed_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "profile.json"
    found = await measure_backends(1, cache)
    assert present_names(found)[0] == "cpu"
    assert cpu_gflops(found) > 0
    assert {"openvino", "cuda"} <= {provider.name for provider in found}
    assert "onnxruntime-" in json.loads(cache.read_text())["key"]
    fake_probe(monkeypatch, tmp_path, NOT_TWICE)
    if not any(provider.broken for provider in found):
        assert await measure_backends(1, cache) == found
    assert await measure_backends(2, cache) == ()  # of another number of threads


async def test_what_is_broken_is_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [ENTRY, {**ENTRY, "name": "gpu", "present": False, "broken": True}]
    cache = tmp_path / "profile.json"
    fake_probe(monkeypatch, tmp_path, f"print({json.dumps({'backends': entries})!r})")
    assert present_names(await measure_backends(1, cache)) == ("cpu",)
    entries[1] = {**ENTRY, "name": "gpu"}
    fake_probe(monkeypatch, tmp_path, f"print({json.dumps({'backends': entries})!r})")
    assert present_names(await measure_backends(1, cache)) == ("cpu", "gpu")
    fake_probe(monkeypatch, tmp_path, NOT_TWICE)
    assert present_names(await measure_backends(1, cache)) == ("cpu", "gpu")


@pytest.mark.parametrize("left", ["[", '{"cpu": 12.5}', '{"key": "old", "backends": 7}'])
async def test_a_damaged_memory_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    cache = tmp_path / "profile.json"
    cache.write_text(left)
    fake_probe(monkeypatch, tmp_path, f"print({json.dumps({'backends': [ENTRY]})!r})")
    assert cpu_gflops(await measure_backends(1, cache)) == 123.0
    fake_probe(monkeypatch, tmp_path, NOT_TWICE)
    assert cpu_gflops(await measure_backends(1, cache)) == 123.0


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
async def test_what_cannot_be_probed_is_nothing_and_one_warning(
    tmp_path: Path,
    python: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with caplog.at_level(logging.WARNING):
        assert await measure_backends(1, tmp_path / "profile.json") == ()
    assert len(caplog.records) == 1
    assert not (tmp_path / "profile.json").exists()


async def test_a_probe_and_what_it_started_end_with_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture that looks for what lingers sees both processes."""
    started = tmp_path / "started"
    program = f"""
import pathlib, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
pathlib.Path({str(started)!r}).touch()
signal.pause()
"""
    fake_probe(monkeypatch, tmp_path, program)
    probing = asyncio.create_task(measure_backends(1, tmp_path / "profile.json"))
    await until(started.exists, "the probe has started")
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
