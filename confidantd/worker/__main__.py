"""`python -m confidantd.worker`: started by the daemon, one process per stage."""

from __future__ import annotations

import asyncio
import logging
import sys

from confidantd.confinement import confine
from confidantd.worker.control import ControlPipe
from confidantd.worker.stage_worker import StageWorker


async def _main() -> int:
    pipe = await ControlPipe.standard()
    try:
        return await StageWorker(pipe).run()
    finally:
        pipe.close()


if __name__ == "__main__":
    confine()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    sys.exit(asyncio.run(_main()))
