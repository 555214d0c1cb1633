"""How the parameters of a block are shared out when head groups and MLP columns are split.

A part of the attention holds K of the block's key-value groups with their query heads, a
part of the MLP M of its columns. Every share is a run of rows of the block's parameter,
so it is a view of it; what all parts need (norms, some adapter factors) they share.
"""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.models.layout import Linear, linears, lora_layout, norm_layout, output_major
from confidantd.models.spec import BlockSpec, LoraSpec, ModelSpec
from confidantd.models.tensors import target_linears

GROUPS, COLUMNS = "K", "M"  # the free dimensions of part programs
TOKENS = "T"  # the free dimension of the head's: tokens of a microbatch


@dataclass(frozen=True, slots=True)
class PartParameter:
    """An input of a part program and where it lies in the block.

    Rows [first + i * rows, first + j * rows) of the parameter `source` belong to groups
    (or columns) [i, j). With `rows` 0 every part takes the whole parameter and its
    gradients add up; with `once` only the first part does, and the others take zeros.
    """

    name: str
    shape: tuple[int | str, ...]
    source: str
    first: int = 0
    rows: int = 0
    once: bool = False

    def view_shape(self, count: int) -> tuple[int, ...]:
        """The shape for `count` groups or columns."""
        return tuple(count if isinstance(size, str) else size for size in self.shape)


def attention_parameters(model: ModelSpec, lora: LoraSpec | None) -> tuple[PartParameter, ...]:
    """Inputs of an attention part, in order."""
    block = model.block
    norm = (PartParameter(p.name, p.shape, p.name) for p in norm_layout("norm1", block))
    found: list[PartParameter] = [*norm]
    for name, source, first, width in _projections(block):
        found += _rows(name, source, first, width, block)
    found += _output(_linear(block, "o"), GROUPS, block.heads // block.kv_heads * block.head_dim)
    for linear in _targets(model, lora):
        assert lora is not None
        if linear.name == "o":
            width = block.heads // block.kv_heads * block.head_dim
            found += _output_factors(linear, lora, GROUPS, width)
        elif linear.name in ("q", "k", "v", "qkv"):
            found += _input_factors(linear, lora, block)
    return tuple(found)


def mlp_parameters(model: ModelSpec, lora: LoraSpec | None) -> tuple[PartParameter, ...]:
    """Inputs of an MLP part, in order."""
    block = model.block
    norm = (PartParameter(p.name, p.shape, p.name) for p in norm_layout("norm2", block))
    found: list[PartParameter] = [*norm]
    for linear in linears(block):
        if linear.name not in ("gate", "up"):
            continue
        weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
        found.append(PartParameter(weight, (COLUMNS, linear.inputs), weight, 0, 1))
        if linear.bias:
            found.append(PartParameter(bias, (COLUMNS,), bias, 0, 1))
    found += _output(_linear(block, "down"), COLUMNS, 1)
    for linear in _targets(model, lora):
        assert lora is not None
        a, b = lora_layout(linear, lora)
        if linear.name == "down":
            found += _output_factors(linear, lora, COLUMNS, 1)
        elif linear.name in ("gate", "up"):
            found.append(PartParameter(a.name, a.shape, a.name))
            found.append(PartParameter(b.name, (COLUMNS, lora.rank), b.name, 0, 1))
    return tuple(found)


def _projections(block: BlockSpec) -> list[tuple[str, str, int, int]]:
    """(name, module it lies in, first row there, rows of one group) of q, k and v."""
    size = block.head_dim
    query = block.heads // block.kv_heads * size
    if not block.fused_qkv:
        return [("q", "q", 0, query), ("k", "k", 0, size), ("v", "v", 0, size)]
    keys = block.heads * size
    values = keys + block.kv_heads * size
    return [("q", "qkv", 0, query), ("k", "qkv", keys, size), ("v", "qkv", values, size)]


def _rows(name: str, source: str, first: int, width: int, block: BlockSpec) -> list[PartParameter]:
    """Weight and bias of a projection, by groups."""
    assert output_major(source)
    weight = PartParameter(
        f"{name}.weight", (GROUPS, width, block.hidden), f"{source}.weight", first, width
    )
    if not block.attention_bias:
        return [weight]
    bias = PartParameter(f"{name}.bias", (GROUPS, width), f"{source}.bias", first, width)
    return [weight, bias]


def _output(linear: Linear, symbol: str, width: int) -> list[PartParameter]:
    """Weight and bias of a module that writes the hidden state; its rows are its inputs."""
    shape = (symbol, linear.outputs) if width == 1 else (symbol, width, linear.outputs)
    found = [PartParameter(f"{linear.name}.weight", shape, f"{linear.name}.weight", 0, width)]
    if linear.bias:
        bias = f"{linear.name}.bias"
        found.append(PartParameter(bias, (linear.outputs,), bias, once=True))
    return found


def _output_factors(linear: Linear, lora: LoraSpec, symbol: str, width: int) -> list[PartParameter]:
    a, b = lora_layout(linear, lora)
    shape = (symbol, lora.rank) if width == 1 else (symbol, width, lora.rank)
    return [PartParameter(a.name, shape, a.name, 0, width), PartParameter(b.name, b.shape, b.name)]


def _input_factors(linear: Linear, lora: LoraSpec, block: BlockSpec) -> list[PartParameter]:
    a, b = lora_layout(linear, lora)
    found = [PartParameter(a.name, a.shape, a.name)]
    for name, source, first, width in _projections(block):
        if source == linear.name:
            shape = (GROUPS, width, lora.rank)
            found.append(PartParameter(f"{name}.lora_b", shape, b.name, first, width))
    return found


def _linear(block: BlockSpec, name: str) -> Linear:
    return next(linear for linear in linears(block) if linear.name == name)


def _targets(model: ModelSpec, lora: LoraSpec | None) -> tuple[Linear, ...]:
    return () if lora is None else target_linears(model, lora.targets)
