"""How light an idle daemon is: resident memory and CPU share with two peers, after a minute.

Run from the project's folder: `python -m benchmarks.idle`. `--quick` waits 20 s.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.report import Claim, options, report
from tests.e2e.devices import swarm

REACH_BYTES = 64 * 1024 * 1024
REACH_CPU_PERCENT = 2.0


def main() -> int:
    """Three daemons on loopback; the largest of each figure counts."""
    chosen = options(__doc__ or "")
    seconds = 20.0 if chosen.quick else 60.0
    with tempfile.TemporaryDirectory() as folder, swarm(Path(folder), 3) as devices:
        daemons = [psutil.Process(device.pid) for device in devices]
        before = [daemon.cpu_times() for daemon in daemons]
        time.sleep(seconds)
        used = [
            (now.user + now.system - then.user - then.system) / seconds
            for now, then in zip((d.cpu_times() for d in daemons), before, strict=True)
        ]
        sizes = [daemon.memory_info().rss for daemon in daemons]
    megabyte = 1024 * 1024
    claims = [
        Claim(
            "resident memory of an idle daemon with two peers",
            max(sizes) / megabyte,
            REACH_BYTES / megabyte,
            "MiB",
            f"largest of {len(sizes)} after {seconds:.0f} s",
        ),
        Claim(
            "CPU of an idle daemon with two peers",
            100 * statistics.median(used),
            REACH_CPU_PERCENT,
            "% of a core",
            f"median of {len(used)} over {seconds:.0f} s",
        ),
    ]
    return report(claims, as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
