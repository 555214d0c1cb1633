"""A share of a block's weights: the rows of a range of head groups or MLP columns, as views."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import GRADIENT, Group
from confidantd.models.parts import PartParameter

Named = dict[str, Floats]


@dataclass(frozen=True, slots=True)
class Share:
    """Groups or columns [first, past_last) of a unit.

    `leads`: this share takes what only one may have, such as a bias of the sum.
    """

    parameters: tuple[PartParameter, ...]
    first: int
    past_last: int
    leads: bool

    @property
    def count(self) -> int:
        """How many groups or columns."""
        return self.past_last - self.first

    def weights(self, block: Group) -> Named:
        """Inputs of the share's programs; nothing is copied."""
        return {p.name: self._view(p, block) for p in self.parameters}

    def _view(self, parameter: PartParameter, block: Group) -> Floats:
        whole = block.weights[parameter.source]
        if parameter.once and not self.leads:
            return _zeros(whole.shape)
        if parameter.rows == 0:
            return whole
        start, stop = self._rows(parameter)
        return whole[start:stop].reshape(parameter.view_shape(self.count))

    def _rows(self, parameter: PartParameter) -> tuple[int, int]:
        rows = parameter.rows
        return parameter.first + self.first * rows, parameter.first + self.past_last * rows

    def gradient_targets(self, block: Group) -> Named:
        """Where the share's backward may write this step's first gradients, by output name."""
        found = {}
        for parameter, start, stop in self._trained(block):
            trained = block.trained[parameter.source]
            if trained.empty(start) and (parameter.rows or self.leads):
                found[f"{GRADIENT}{parameter.name}"] = trained.rows(start, stop)
        return found

    def add_gradients(self, outputs: Named, block: Group) -> None:
        """Add what the share's backward found."""
        for parameter, start, _ in self._trained(block):
            block.trained[parameter.source].add(outputs[f"{GRADIENT}{parameter.name}"], start)

    def _trained(self, block: Group) -> Iterator[tuple[PartParameter, int, int]]:
        """What this share has a gradient of: (parameter, first row, row past the last)."""
        for parameter in self.parameters:
            if parameter.source not in block.trained or (parameter.once and not self.leads):
                continue
            if parameter.rows == 0:
                yield parameter, 0, len(block.trained[parameter.source].weight)
            else:
                yield (parameter, *self._rows(parameter))


@functools.cache
def _zeros(shape: tuple[int, ...]) -> Floats:
    return np.zeros(shape, np.float32)
