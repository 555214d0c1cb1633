"""Adding rows of tokens to a table, where a program would write a whole table of zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group


def add_rows(table: Floats, ids: NDArray[Any], rows: Floats) -> None:
    """table[ids[i]] += rows[i] for every i, in an order that ids alone decide; ids [N] may
    repeat.
    """
    if ids.size:
        order = np.argsort(ids, kind="stable")
        tokens, starts = np.unique(ids[order], return_index=True)
        table[tokens] += np.add.reduceat(rows[order], starts, axis=0)


def embedding_backward(dy: Floats, ids: NDArray[Any], embedding: Group) -> None:
    """Add the gradients of a microbatch: ids [B, S], and dy by the embedding's output."""
    dy = dy.reshape(*ids.shape, -1)
    table = embedding.trained["embedding.weight"].accumulator()
    add_rows(table, ids.reshape(-1), dy.reshape(ids.size, -1))
    positions = embedding.trained.get("positions.weight")
    if positions is not None:
        positions.accumulator()[: ids.shape[1]] += dy.sum(0)
