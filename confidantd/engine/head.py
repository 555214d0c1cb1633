"""The LM head of a training stage over chunks of tokens, so that few logits exist at a time.

Losses and gradients add up over tokens. The gradient of the table, as large as the table,
is added up in place: most of it within its product, and a row for each label after that.
All other outputs are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.program import EngineProgram
from confidantd.engine.rows import add_rows
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import GRADIENT, Group
from confidantd.models.parts import TOKENS

IGNORED_LABEL = -100
TABLE = "head.weight"

Array = NDArray[Any]
Outputs = dict[str, Array]


def next_tokens(labels: Array) -> Array:
    """Labels [B, S] moved to the token that predicts them, as one row [B S]; the last of each
    sequence predicts nothing that counts.
    """
    moved = np.full_like(labels, IGNORED_LABEL)
    moved[:, :-1] = labels[:, 1:]
    return moved.reshape(-1)


def chunks(wanted: Array, size: int) -> Iterator[tuple[slice, Array]]:
    """Runs of just `size` tokens (or all, if there are fewer) and their labels, the last first.

    Programs are made for one size. So the last chunk reaches back into the one before it,
    with labels there that do not count, and the one before overwrites what it gave there.
    """
    size = min(size, len(wanted))
    for start in reversed(range(0, len(wanted), size)):
        first = min(start, len(wanted) - size)
        labels = wanted[first : first + size].copy()
        labels[: start - first] = IGNORED_LABEL
        yield slice(first, first + size), labels


class HeadPass:
    """The backward of some tokens x [T, D] with labels `wanted` [T], chunk by chunk.

    The gradient by x is written to `dx` [T, D], that of the table added to `table_sum` [V, D]
    if it is trained. What a program that fails has not done is left for another `run`.
    """

    def __init__(
        self,
        size: int,
        x: Floats,
        wanted: Array,
        scale: Array,
        dx: Floats,
        table_sum: Floats | None,
    ) -> None:
        self._left = list(chunks(wanted, size))[::-1]
        self._x, self._dx, self._scale = x, dx, scale
        self._table_sum = table_sum
        self._table = {} if table_sum is None else {f"sum.{TABLE}": table_sum}
        self._into = {} if table_sum is None else {f"{GRADIENT}{TABLE}": table_sum}
        self.loss = 0.0
        self.gradients: Outputs = {}

    def run(self, program: EngineProgram, weights: Outputs) -> HeadPass:
        """Do what is left; then `loss` is the scaled loss, and `gradients` are those by weight,
        without the table's.
        """
        while self._left:
            part, labels = self._left[-1]
            feeds = {"x": self._x[part], "labels": labels, "scale": self._scale, **self._table}
            found = program.run(feeds, weights, into={"dx": self._dx[part], **self._into})
            self._left.pop()
            self.loss += float(found["loss"])
            if self._table_sum is not None:
                counted = labels != IGNORED_LABEL
                add_rows(self._table_sum, labels[counted], -found["label_rows"][counted])
            for name, array in found.items():
                if name.startswith(GRADIENT) and name not in self._into:
                    before = self.gradients.get(name)
                    self.gradients[name] = array if before is None else before + array
        return self


def head_loss(
    program: EngineProgram, size: int, x: Floats, wanted: Array, weights: Outputs
) -> float:
    """Summed negative log-likelihood (nats) of tokens x [T, D]."""
    return sum(
        float(program.run({"x": x[part], "labels": labels}, weights)["loss"])
        for part, labels in chunks(wanted, size)
    )


def table_sum(head: Group) -> Floats | None:
    """Where this step's gradient of the table adds up; None if it is frozen."""
    trained = head.trained.get(TABLE)
    return None if trained is None else trained.accumulator()


def flat(x: Floats) -> Floats:
    """Hidden states of a microbatch [B, S, D] (or [T, D]) as [T, D]."""
    return x.reshape(-1, x.shape[-1])


def sizes_of(size: int) -> dict[str, int]:
    """The free dimension of the head's programs for chunks of `size` tokens."""
    return {TOKENS: size}
