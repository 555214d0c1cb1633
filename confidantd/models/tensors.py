"""Which checkpoint tensors a stage needs, and how many parameters its parts have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from confidantd.errors import UsageError
from confidantd.models.families import family_of
from confidantd.models.layout import (
    Linear,
    Parameter,
    block_layout,
    embedding_layout,
    head_layout,
    linears,
    lora_layout,
    output_major,
)
from confidantd.models.spec import LoraSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies in a checkpoint: its name, and whether it is stored transposed."""

    parameter: Parameter
    name: str
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        shape = self.parameter.shape
        return shape[::-1] if self.transposed else shape


def block_sources(spec: ModelSpec, layer: int) -> tuple[Source, ...]:
    """The parameters of one block."""
    family = family_of(spec.family)
    found = []
    for parameter in block_layout(spec.block):
        module, kind = parameter.name.split(".")
        name = f"{family.block_prefix(layer)}{family.block_names[module]}.{kind}"
        turned = len(parameter.shape) == 2 and family.output_major != output_major(module)
        found.append(Source(parameter, name, turned))
    return tuple(found)


def embedding_sources(spec: ModelSpec) -> tuple[Source, ...]:
    """The token table, and the position table if there is one."""
    names = family_of(spec.family).names
    return tuple(Source(p, names[p.name], transposed=False) for p in embedding_layout(spec))


def head_sources(spec: ModelSpec) -> tuple[Source, ...]:
    """The final norm and the LM head, which is the token table if they are tied."""
    names = dict(family_of(spec.family).names)
    if spec.tied:
        names["head.weight"] = names["embedding.weight"]
    return tuple(Source(p, names[p.name], transposed=False) for p in head_layout(spec))


def stage_sources(
    spec: ModelSpec, first: int, past_last: int, *, embedding: bool, head: bool
) -> tuple[Source, ...]:
    """Every parameter of a stage; a tied table that is both ends appears once."""
    found = list(embedding_sources(spec)) if embedding else []
    for layer in range(first, past_last):
        found.extend(block_sources(spec, layer))
    if head:
        there = {source.name for source in found}
        found.extend(s for s in head_sources(spec) if s.name not in there)
    return tuple(found)


def stage_tensor_names(
    spec: ModelSpec, first: int, past_last: int, embedding: bool, head: bool
) -> tuple[str, ...]:
    """The checkpoint names that a stage needs; a tied head needs the token table."""
    sources = stage_sources(spec, first, past_last, embedding=embedding, head=head)
    return tuple(source.name for source in sources)


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def block_parameters(spec: ModelSpec) -> int:
    """Number of weights in one block."""
    return _count(block_layout(spec.block))


def embedding_parameters(spec: ModelSpec) -> int:
    """Number of weights before the first block."""
    return _count(embedding_layout(spec))


def head_parameters(spec: ModelSpec) -> int:
    """Number of weights after the last block, the tied table included."""
    return _count(head_layout(spec))


def lora_parameters(spec: ModelSpec, lora: LoraSpec) -> int:
    """Number of adapter weights in one block."""
    return sum(_count(lora_layout(linear, lora)) for linear in target_linears(spec, lora.targets))


def matches(module: str, target: str) -> bool:
    """`peft`'s rule for a list of targets: the whole name, or its end after a dot."""
    return module == target or module.endswith(f".{target}")


def target_linears(spec: ModelSpec, targets: Sequence[str]) -> tuple[Linear, ...]:
    """The linear modules of each block that get an adapter."""
    names = family_of(spec.family).block_names
    return tuple(
        linear
        for linear in linears(spec.block)
        if any(matches(names[linear.name], target) for target in targets)
    )


def default_targets(spec: ModelSpec) -> tuple[str, ...]:
    """The attention projections."""
    return family_of(spec.family).default_targets


def possible_targets(spec: ModelSpec) -> tuple[str, ...]:
    """Module paths within a block that a target may name."""
    names = family_of(spec.family).block_names
    return tuple(names[linear.name] for linear in linears(spec.block))


def check_targets(spec: ModelSpec, targets: Sequence[str]) -> None:
    """`UsageError` naming the possible ones if a target matches no module of a block."""
    possible = possible_targets(spec)
    for target in targets:
        if not any(matches(module, target) for module in possible):
            raise UsageError(
                f"no module of a block is called {target!r:.60}",
                f"possible target modules: {', '.join(possible)}",
            )
    if not targets:
        raise UsageError(
            "LoRA needs at least one target module",
            f"possible target modules: {', '.join(possible)}",
        )
