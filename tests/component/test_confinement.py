"""What a subprocess that only computes gives up."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, os, resource
from confidantd.confinement import confine
confine()
confine()
status = open("/proc/self/status").read().split()
print(json.dumps({
    "privileges": status[status.index("NoNewPrivs:") + 1],
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
}))
"""


def test_it_gains_no_privileges_leaves_no_core_and_opens_so_many_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["privileges"] == "1"
    assert found["core"] == [0, 0]
    assert 0 < found["files"][1] <= 1024
