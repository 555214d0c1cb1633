"""Running one block of a training stage: what all ways have in common, and the simplest way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from confidantd.engine.program import Programs
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import GRADIENT, Group

Named = dict[str, Floats]
SAVED, SUM = "saved.", "sum."


@dataclass(slots=True)
class Saved:
    """What the forward of one block keeps for its backward: tensors of each part by unit.

    `middle` is the hidden state between attention and MLP, where the two run apart.
    """

    units: dict[str, list[Named]] = field(default_factory=dict)
    middle: Floats | None = None

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        parts = [part for parts in self.units.values() for part in parts]
        held = sum(array.nbytes for part in parts for array in part.values())
        return held + (0 if self.middle is None else self.middle.nbytes)


class BlockRunner(Protocol):
    """Computes any block of a stage from its group of weights. Arrays are [b, S, D] or [N, D]."""

    def forward(self, x: Floats, block: Group, *, keep: bool) -> tuple[Floats, Saved | None]:
        """The block's output, and what its backward needs of this forward: with `keep` all of
        it, else as little as this way of running keeps.
        """
        ...

    def backward(self, dy: Floats, x: Floats, saved: Saved | None, block: Group) -> Floats:
        """The gradient by the block's input x; adds to the gradients of the weights.

        What `saved` lacks is computed again.
        """
        ...


def saved_only(outputs: Named) -> Named:
    """Those outputs that the backward takes as inputs."""
    return {name: array for name, array in outputs.items() if name.startswith(SAVED)}


class FusedBlocks:
    """Whole blocks on one backend."""

    UNIT = "block"
    PROGRAMS = ("block_forward", "block_recompute", "block_backward")

    def __init__(self, programs: Programs, name: str = "cpu") -> None:
        self._name = name
        self._clock = BackwardClock()
        self.busy_seconds = 0.0
        self._forward = programs["block_forward"]
        self._recompute = programs["block_recompute"]
        self._backward = programs["block_backward"]
        self._held = tuple(n for n in self._recompute.inputs if n.startswith(SAVED))

    def forward(self, x: Floats, block: Group, *, keep: bool) -> tuple[Floats, Saved | None]:
        """One program."""
        started = time.perf_counter()
        only = None if keep else ("y", *self._held)
        found = self._forward.run({"x": x}, block.weights, only=only)
        self.busy_seconds += time.perf_counter() - started
        return found["y"].reshape(x.shape), Saved({self.UNIT: [saved_only(found)]})

    def backward(self, dy: Floats, x: Floats, saved: Saved | None, block: Group) -> Floats:
        """One program, after what it needs was computed again or not."""
        started = time.perf_counter()
        if saved is None:
            _, saved = self.forward(x, block, keep=False)
        assert saved is not None
        (kept,) = saved.units[self.UNIT]
        if len(kept) == len(self._held):
            kept = kept | self._recompute.run({"x": x}, kept, block.weights)
        sums = block.accumulators()
        into = {f"{GRADIENT}{name}": array for name, array in sums.items()}
        before = {f"{SUM}{name}": array for name, array in sums.items()}
        feeds = {"dy": dy, "x": x, **before}
        found = self._backward.run(feeds, kept, block.weights, into=into)
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        self._clock.add({self._name: seconds})
        return found["dx"].reshape(x.shape)

    def take_backward_seconds(self) -> dict[str, float]:
        """Of the one backend."""
        return self._clock.take()


class BackwardClock:
    """Mean seconds of backends over backwards."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._count = 0

    def add(self, seconds: Mapping[str, float]) -> None:
        """One backward."""
        self._count += 1
        for name, more in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + more

    def take(self) -> dict[str, float]:
        """The means since the last call; empty if there was no backward."""
        found = {name: seconds / self._count for name, seconds in self._seconds.items()}
        self._seconds, self._count = {}, 0
        return found
