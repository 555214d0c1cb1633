"""The speed of a device: really measured once, remembered, and 0 where that is not possible."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from confidantd.profile.measure import measure_speed


async def test_measured_once_and_remembered(tmp_path: Path) -> None:
    cache = tmp_path / "profile.json"
    gflops = await measure_speed(1, cache)
    assert gflops > 0
    (key,) = json.loads(cache.read_text())
    assert "onnxruntime" in key
    cache.write_text(json.dumps({key: 123.0}))
    assert await measure_speed(1, cache) == 123.0


async def test_a_damaged_memory_is_measured_again(tmp_path: Path) -> None:
    cache = tmp_path / "profile.json"
    cache.write_text("[")
    assert await measure_speed(1, cache) > 0


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
async def test_what_cannot_be_measured_is_0_and_one_warning(
    tmp_path: Path,
    python: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with caplog.at_level(logging.WARNING):
        assert await measure_speed(1, tmp_path / "profile.json") == 0.0
    assert len(caplog.records) == 1
    assert not (tmp_path / "profile.json").exists()
