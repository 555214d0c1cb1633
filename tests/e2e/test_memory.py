"""A worker that takes more memory than it was granted ends with that reason, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from tests.e2e.devices import Device, running
from tests.e2e.small_models import make_small

LEAK_MEGABYTES = 500
# Every worker of a device: as if a library in it leaked.
LEAKS = f"""
import sys
if "confidantd.worker" in sys.orig_argv:
    leak = b"x" * {LEAK_MEGABYTES * 10**6}
"""


def test_a_worker_over_its_grant_fails_its_job_and_the_daemon_lives_on(tmp_path: Path) -> None:
    small = make_small("llama", tmp_path)
    (tmp_path / "sitecustomize.py").write_text(LEAKS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    device = Device(tmp_path / "anna", "anna", settings={"PYTHONPATH": path})
    with running([device]):
        done = device.cli("generate", str(small.folder), "--prompt", small.prompt)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert "stage 0 (layers 0 to 2) uses" in line
        assert "where it was granted" in line
        assert "--memory" in line
        assert device.json("status")["memory"]["granted_bytes"] == 0
        (failure,) = device.events("generate", str(small.folder), "--prompt", small.prompt)
        assert failure["error"]["code"] == "does-not-fit"
