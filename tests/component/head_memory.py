"""`python -m tests.component.head_memory PROGRAM TOKENS VOCABULARY WIDTH`: bytes that one backward
of a head takes at its peak beyond the table and its gradient; without torch, as on a worker.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from confidantd.engine.head import TABLE, HeadPass, sizes_of, table_sum
from confidantd.engine.program import load_programs
from confidantd.engine.trained_weights import Group, Trained
from confidantd.models.layout import Parameter
from confidantd.models.tensors import Source
from confidantd.planner.memory import head_chunk
from confidantd.worker.memory import peak_memory_bytes


def main(program: str, tokens: int, vocabulary: int, width: int) -> None:
    """Prints the bytes."""
    chunk = head_chunk(tokens, vocabulary, "saved")
    programs = load_programs({"head_backward": Path(program)}, {"head_backward"}, 1, None,
                             sizes_of(chunk))  # fmt: skip
    table = np.full((vocabulary, width), 0.01, np.float32)
    source = Source(Parameter(TABLE, table.shape), TABLE, transposed=False)
    head = Group({"norm.weight": np.ones(width, np.float32), TABLE: table})
    head.trained[TABLE] = Trained(source, table)
    summed = table_sum(head)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((tokens, width), np.float32)
    wanted = generator.integers(0, vocabulary, tokens)
    work = HeadPass(chunk, x, wanted, np.array(1 / tokens, np.float32), np.empty_like(x), summed)
    before = peak_memory_bytes()
    work.run(programs["head_backward"], head.weights)
    print(peak_memory_bytes() - before)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
