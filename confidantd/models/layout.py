"""The parameters of embedding, block and head as the programs take them.

Matrices are in matmul layout [in, out] (a Hugging Face `Linear` stores [out, in]);
the LM head stays [V, D], so that a tied model needs one array for both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.models.spec import BlockSpec, LoraSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight: its name as a program input, and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module of a block; parameters `<name>.weight` [in, out] and `<name>.bias`."""

    name: str
    inputs: int
    outputs: int
    bias: bool


def linears(block: BlockSpec) -> tuple[Linear, ...]:
    """The linear modules of a block, in the order in which they are computed."""
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    d, m = block.hidden, block.columns
    if block.fused_qkv:
        attention = [Linear("qkv", d, query + 2 * key, block.attention_bias)]
    else:
        widths = (("q", query), ("k", key), ("v", key))
        attention = [Linear(name, d, width, block.attention_bias) for name, width in widths]
    attention.append(Linear("o", query, d, block.attention_bias))
    inner = ("gate", "up") if block.gated else ("up",)
    mlp = [Linear(name, d, m, block.mlp_bias) for name in inner]
    return (*attention, *mlp, Linear("down", m, d, block.mlp_bias))


def _norm(name: str, block: BlockSpec) -> tuple[Parameter, ...]:
    kinds = ("weight", "bias") if block.norm == "layer" else ("weight",)
    return tuple(Parameter(f"{name}.{kind}", (block.hidden,)) for kind in kinds)


def block_layout(block: BlockSpec) -> tuple[Parameter, ...]:
    """Every parameter of a block."""
    found = [*_norm("norm1", block), *_norm("norm2", block)]
    for linear in linears(block):
        found.append(Parameter(f"{linear.name}.weight", (linear.inputs, linear.outputs)))
        if linear.bias:
            found.append(Parameter(f"{linear.name}.bias", (linear.outputs,)))
    return tuple(found)


def embedding_layout(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Token table [V, D] and, for learned positions, their table [P, D]."""
    tokens = Parameter("embedding.weight", (spec.vocabulary, spec.block.hidden))
    if spec.positions == "rope":
        return (tokens,)
    return (
        tokens,
        Parameter("positions.weight", (spec.max_positions, spec.block.hidden)),
    )


def head_layout(spec: ModelSpec) -> tuple[Parameter, ...]:
    """The final norm, and the LM head [V, D]."""
    head = Parameter("head.weight", (spec.vocabulary, spec.block.hidden))
    return (*_norm("norm", spec.block), head)


def lora_layout(linear: Linear, lora: LoraSpec) -> tuple[Parameter, Parameter]:
    """The two factors beside a linear module: A [in, r] and B [r, out]."""
    a = Parameter(f"{linear.name}.lora_a", (linear.inputs, lora.rank))
    return a, Parameter(f"{linear.name}.lora_b", (lora.rank, linear.outputs))
