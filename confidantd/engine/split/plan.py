"""From shares by number to parts with rows: who computes which groups and columns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confidantd.engine.split.blocks import ATTENTION, MLP, Part
from confidantd.engine.split.parts import BackendPrograms, BackendThread
from confidantd.engine.split.shares import Share
from confidantd.models.parts import PartParameter, attention_parameters, mlp_parameters
from confidantd.models.spec import LoraSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """How many head groups and MLP columns each backend gets, by unit; one number a backend."""

    counts: Mapping[str, tuple[int, ...]]

    def of(self, backend: int) -> dict[str, int]:
        """Counts of one backend by unit."""
        return {unit: counts[backend] for unit, counts in self.counts.items()}


def make_parts(
    model: ModelSpec,
    lora: LoraSpec | None,
    programs: Sequence[BackendPrograms],
    threads: Sequence[BackendThread],
    placement: Placement,
) -> list[Part]:
    """A part for each backend, with the rows that follow those of the backends before it."""
    parameters = {
        ATTENTION: attention_parameters(model, lora),
        MLP: mlp_parameters(model, lora),
    }
    shares = {unit: _shares(parameters[unit], counts) for unit, counts in placement.counts.items()}
    return [
        Part(made, thread, {u: s[i] for u, s in shares.items() if s[i].count})
        for i, (made, thread) in enumerate(zip(programs, threads, strict=True))
    ]


def _shares(parameters: tuple[PartParameter, ...], counts: Sequence[int]) -> list[Share]:
    ends = [0, *itertools.accumulate(counts)]
    leader = next(i for i, count in enumerate(counts) if count)
    return [
        Share(parameters, first, past_last, leads=i == leader)
        for i, (first, past_last) in enumerate(itertools.pairwise(ends))
    ]
