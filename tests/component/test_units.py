"""The service files: clean for systemd, valid for a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"


EXPOSURE = 20  # tenths


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which CI must have."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if os.environ.get("CONFIDANT_REQUIRE_LAN") == "1":
            pytest.fail("systemd-analyze is required here")
        pytest.skip("needs systemd-analyze")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run(
        [tool, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("unit", "options"), [("confidantd.service", ()), ("confidantd-user.service", ("--user",))]
)
def test_units_are_clean(tmp_path: Path, unit: str, options: tuple[str, ...]) -> None:
    file = shutil.copy(SYSTEMD / unit, tmp_path / "confidantd.service")
    done = analyze(tmp_path, "verify", *options, str(file))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_system_unit_is_confined(tmp_path: Path) -> None:
    unit = str(SYSTEMD / "confidantd.service")
    done = analyze(tmp_path, "security", "--offline=true", f"--threshold={EXPOSURE}", unit)
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout


def test_the_runit_script_is_valid_and_executable() -> None:
    script = SYSTEMD / "termux" / "confidantd" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)
