"""A program before it is exported: a torch function with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from confidantd.models.layout import Parameter

Values = Mapping[str, Tensor]
Role = Literal[
    "activation", "weight", "adapter", "gradient", "ids", "labels", "scale", "loss", "logits",
    "cache", "position", "saved",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. A `str` in `shape` is a dimension that is free at run time: a name,
    or a multiple of one like `4*K`.
    """

    name: str
    role: Role
    shape: tuple[int | str, ...]
    dtype: Literal["float32", "int64"] = "float32"


@dataclass(frozen=True, slots=True)
class Program:
    """`compute` maps tensors by input (or constant) name to tensors by output name.

    `constants` are written into the program. `differentiates` says that `compute`
    calls `torch.func.vjp`.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    compute: Callable[[Values], Values]
    constants: Values = field(default_factory=dict)
    differentiates: bool = False


# Sizes that free dimensions have while a program is made: all different, and over 1,
# because export treats 0 and 1 as special.
EXAMPLE_SIZES = {"b": 2, "T": 3, "C": 5, "K": 7, "M": 1009}


def example_shape(port: Port) -> tuple[int, ...]:
    """The shape that a port has while its program is made."""
    return tuple(_example_size(size) for size in port.shape)


def _example_size(size: int | str) -> int:
    if isinstance(size, int):
        return size
    factor, symbol = free_size(size)
    return factor * EXAMPLE_SIZES[symbol]


def free_size(text: str) -> tuple[int, str]:
    """The factor and the name of a free dimension."""
    factor, _, symbol = text.rpartition("*")
    return int(factor or 1), symbol


@dataclass(frozen=True, slots=True)
class Traced:
    """A program that is a graph already. `arguments` names its placeholders, constants too."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    graph: fx.GraphModule
    arguments: tuple[str, ...]
    constants: Values = field(default_factory=dict)


def ports(parameters: Iterable[Parameter], role: Role = "weight") -> tuple[Port, ...]:
    """Parameters as inputs."""
    return tuple(Port(p.name, role, p.shape) for p in parameters)


def gradients(parameters: Iterable[Parameter]) -> tuple[Port, ...]:
    """The gradients of parameters as outputs `gradient.<name>`."""
    return tuple(Port(f"gradient.{p.name}", "gradient", p.shape) for p in parameters)
