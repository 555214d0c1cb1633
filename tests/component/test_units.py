"""The service files: clean for systemd, valid for a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"


@pytest.mark.parametrize(
    ("unit", "options"), [("confidantd.service", ()), ("confidantd-user.service", ("--user",))]
)
def test_units_are_clean(tmp_path: Path, unit: str, options: tuple[str, ...]) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if os.environ.get("CONFIDANT_REQUIRE_LAN") == "1":
            pytest.fail("systemd-analyze is required here")
        pytest.skip("needs systemd-analyze")
    file = shutil.copy(SYSTEMD / unit, tmp_path / "confidantd.service")
    done = subprocess.run(
        [tool, "verify", *options, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_runit_script_is_valid_and_executable() -> None:
    script = SYSTEMD / "termux" / "confidantd" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)
