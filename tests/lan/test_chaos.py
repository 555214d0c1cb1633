"""Three minutes in which something breaks every ten seconds: everything ends right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.devices import Device, running
from tests.e2e.small_models import TEXT
from tests.e2e.test_replanning import make_model
from tests.lan.chaos import NAMES, TRAININGS, Chaos
from tests.lan.namespaces import Lan

pytestmark = [pytest.mark.lan, pytest.mark.slow]

SECONDS, SEED, STEPS, TOKENS = 180.0, 11, 200, 1_200
MBIT = 5.0  # so that links are what takes time: other tests run beside it
MOST_GROWTH_BYTES, MOST_MORE_FILES = 5_000_000, 8


def test_whatever_breaks_every_job_and_text_ends_right(tmp_path: Path) -> None:
    """Six devices: three train, one generates; nothing is left behind."""
    model = make_model(tmp_path / "model", 64, 160, positions=2 * TOKENS)
    with Lan(len(NAMES), mbit=MBIT) as lan:
        devices = [
            Device(tmp_path / name, name, prefix=host.prefix, host=host.address)
            for name, host in zip(NAMES, lan.hosts, strict=True)
        ]
        with running(devices):
            chaos = Chaos(tmp_path, lan, devices, model, TEXT, STEPS, TOKENS)
            result = chaos.run(SECONDS, SEED)
    assert not result.wrong, result
    assert not result.left_behind, result
    assert result.trained >= 2 * len(TRAININGS), result
    assert result.epochs > result.trained, "no job was ever cut short"
    assert max(result.grown_bytes.values()) < MOST_GROWTH_BYTES, result
    assert max(result.more_files.values()) <= MOST_MORE_FILES, result
