"""A program before it is exported: a torch function with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from confidantd.models.layout import Parameter

Values = Mapping[str, Tensor]
Role = Literal[
    "activation", "weight", "adapter", "gradient", "ids", "labels", "scale", "loss", "logits",
    "cache", "position",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. A `str` in `shape` is a dimension that is free at run time."""

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


def ports(parameters: Iterable[Parameter], role: Role = "weight") -> tuple[Port, ...]:
    """Parameters as inputs."""
    return tuple(Port(p.name, role, p.shape) for p in parameters)


def gradients(parameters: Iterable[Parameter]) -> tuple[Port, ...]:
    """The gradients of parameters as outputs `gradient.<name>`."""
    return tuple(Port(f"gradient.{p.name}", "gradient", p.shape) for p in parameters)
