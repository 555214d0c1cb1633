"""`python -m benchmarks.step_memory MODEL FORM NAME=PROGRAM...`: peak memory in bytes.

Of two steps, in a process of its own without torch, as a worker is; `benchmarks.backends`
runs it in each form.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

from benchmarks.engine_step import EngineStep
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.models.spec import Form
from confidantd.worker.memory import peak_memory_bytes


def main(model: str, form: str, *programs: str) -> None:
    """Prints the peak after two steps."""
    paths = {name: Path(path) for name, _, path in (entry.partition("=") for entry in programs)}
    step = EngineStep(Path(model), paths, [CpuBackend()], form=cast("Form", form))
    step.run()
    step.run()
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
