"""Blocks whose attention and MLP run in parts on several backends at once.

Each backend computes its head groups and its columns on a thread of its own; the parts'
outputs are added to the residual in the order of the parts, so that a run can be repeated.
A backend that fails is left out at once: the CPU computes its shares again, with the same
weights, and the stage goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confidantd.engine.blocks import BackwardClock, Named, Saved, saved_only
from confidantd.engine.split.parts import BackendPrograms, BackendThread
from confidantd.engine.split.shares import Share
from confidantd.engine.tensors import Floats
from confidantd.engine.trained_weights import Group
from confidantd.errors import BackendError
from confidantd.models.parts import COLUMNS, GROUPS

ATTENTION, MLP = "attention", "mlp"
SYMBOLS = {ATTENTION: GROUPS, MLP: COLUMNS}
Failed = Callable[[str, BackendError], None]


@dataclass(slots=True)
class Part:
    """A backend's shares by unit; a unit it has no share in is absent."""

    programs: BackendPrograms
    thread: BackendThread
    shares: dict[str, Share]


class Parts:
    """Parts at work at the same time, each on its thread; the CPU takes over from one that fails,
    which `failed` hears of.
    """

    def __init__(self, parts: Sequence[Part], fallback: BackendPrograms, failed: Failed) -> None:
        self._parts = list(parts)
        self._fallback = fallback
        self._failed = failed
        self._views: dict[tuple[int, int], Named] = {}
        self.seconds: dict[tuple[int, str], float] = {}  # of the last runs: (part, program)

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def run(
        self,
        name: str,
        block: Group,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        only: tuple[str, ...] | None = None,
    ) -> list[Named]:
        """Run one program on every part that has a share; the outputs of each part."""
        running: list[Future[tuple[Named, float]] | None] = []
        for part, given in zip(self._parts, feeds, strict=True):
            running.append(self._start(part, name, block, given, only))
        found: list[Named] = []
        for index, future in enumerate(running):
            if future is None:
                found.append({})
                continue
            try:
                outputs, seconds = future.result()
            except BackendError as failure:
                self._replace(index, failure)
                again = self._start(self._parts[index], name, block, feeds[index], only)
                assert again is not None
                outputs, seconds = again.result()
            self.seconds[index, name] = seconds
            found.append(outputs)
        return found

    def _start(
        self,
        part: Part,
        name: str,
        block: Group,
        feeds: Mapping[str, NDArray[Any]],
        only: tuple[str, ...] | None,
    ) -> Future[tuple[Named, float]] | None:
        unit = name.split("_", maxsplit=1)[0]
        share = part.shares.get(unit)
        if share is None:
            return None
        weights = self._weights(share, block)
        into = share.gradient_targets(block) if name.endswith("_backward") else {}
        programs = part.programs

        return part.thread.start(
            lambda: programs.get(name, SYMBOLS[unit], share.count),
            lambda program: program.run(feeds, weights, into=into, only=only),
        )

    def _weights(self, share: Share, block: Group) -> Named:
        """Views of a share's weights, made once: weights change in place."""
        key = (id(share), id(block))
        if key not in self._views:
            self._views[key] = share.weights(block)
        return self._views[key]

    def _replace(self, index: int, failure: BackendError) -> None:
        """From now on the CPU does what a failed backend did."""
        part = self._parts[index]
        self._failed(part.programs.backend.name, failure)
        self._parts[index] = Part(self._fallback, part.thread, part.shares)


class SplitBlocks:
    """A `BlockRunner` over parts. `failed` hears of backends that were replaced."""

    def __init__(self, parts: Sequence[Part], fallback: BackendPrograms, failed: Failed) -> None:
        self._parts = Parts(parts, fallback, failed)
        self._clock = BackwardClock()

    @property
    def seconds(self) -> dict[tuple[int, str], float]:
        """Of the last runs by (part, program)."""
        return self._parts.seconds

    def forward(self, x: Floats, block: Group, *, keep: bool) -> tuple[Floats, Saved | None]:
        """Attention parts, their sum, MLP parts, their sum."""
        middle, attention = self.unit_forward(ATTENTION, x, block, keep=keep)
        y, mlp = self.unit_forward(MLP, middle, block, keep=keep)
        return y, Saved({ATTENTION: attention, MLP: mlp}, middle) if keep else None

    def backward(self, dy: Floats, x: Floats, saved: Saved | None, block: Group) -> Floats:
        """MLP parts backward, their sum, attention parts backward, their sum."""
        before = [part.thread.busy_seconds for part in self._parts]
        if saved is None:
            saved = self._again(x, block)
        middle = saved.middle
        assert middle is not None
        between = self.unit_backward(MLP, dy, middle, saved, block)
        dx = self.unit_backward(ATTENTION, between, x, saved, block)
        self._clock.add(
            {
                part.thread.name: part.thread.busy_seconds - busy
                for part, busy in zip(self._parts, before, strict=True)
            }
        )
        return dx

    def _again(self, x: Floats, block: Group) -> Saved:
        """What the forward would have saved; the MLP's own sum is not needed."""
        middle, attention = self.unit_forward(ATTENTION, x, block, keep=True)
        mlp = self._parts.run(f"{MLP}_recompute", block, [{"x": middle}] * len(self._parts))
        return Saved({ATTENTION: attention, MLP: mlp}, middle)

    def unit_forward(
        self, unit: str, x: Floats, block: Group, *, keep: bool
    ) -> tuple[Floats, list[Named]]:
        """x plus one unit of it, joined over the parts, and with `keep` what each part saved."""
        only = None if keep else ("y",)
        found = self._parts.run(f"{unit}_forward", block, [{"x": x}] * len(self._parts), only)
        return joined(x, found, "y"), [saved_only(part) for part in found]

    def unit_backward(self, unit: str, dy: Floats, x: Floats, saved: Saved, block: Group) -> Floats:
        """Backward of one unit and its residual: the gradient by x, joined over the parts."""
        feeds = [{"dy": dy, "x": x, **kept} for kept in saved.units[unit]]
        found = self._parts.run(f"{unit}_backward", block, feeds)
        for part, outputs in zip(self._parts, found, strict=True):
            if unit in part.shares:
                part.shares[unit].add_gradients(outputs, block)
        return joined(dy, found, "dx")

    def take_backward_seconds(self) -> dict[str, float]:
        """By backend."""
        return self._clock.take()


def joined(x: Floats, parts: Sequence[Named], name: str) -> Floats:
    """x plus the output `name` of every part, in order; the first part's memory is reused."""
    there = [part[name].reshape(x.shape) for part in parts if name in part]
    total = there[0]
    np.add(x, total, out=total)
    for other in there[1:]:
        np.add(total, other, out=total)
    return total
