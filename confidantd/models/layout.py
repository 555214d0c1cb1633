"""The parameters of embedding, block and head as the programs take them.

The modules that read the hidden state (q, k, v, gate, up) store their matrix as
[out, in], those that write to it (o, down) as [in, out]: so the share of a range of
heads or MLP columns is a run of rows, a view of the whole without a copy. The LM head
is [V, D], so that a tied model needs one array for both ends.
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
    """One linear module of a block: parameters `<name>.weight` and, with `bias`, `<name>.bias`."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix as programs take it."""
        sides = (self.outputs, self.inputs)
        return sides if output_major(self.name) else sides[::-1]


# What ONNX Runtime's GroupQueryAttention wants of the size of a head in the cache.
_HEAD_MULTIPLE = 8


def cached_width(block: BlockSpec) -> int:
    """Numbers of a head in the cache: its size, rounded up to what the attention takes."""
    return -(-block.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


_WRITES_HIDDEN = ("o", "down")


def output_major(name: str) -> bool:
    """Whether the matrix of a linear module is stored [out, in]."""
    return name not in _WRITES_HIDDEN


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


def norm_layout(name: str, block: BlockSpec) -> tuple[Parameter, ...]:
    """The parameters of one norm."""
    kinds = ("weight", "bias") if block.norm == "layer" else ("weight",)
    return tuple(Parameter(f"{name}.{kind}", (block.hidden,)) for kind in kinds)


def block_layout(block: BlockSpec) -> tuple[Parameter, ...]:
    """Every parameter of a block."""
    found = [*norm_layout("norm1", block), *norm_layout("norm2", block)]
    for linear in linears(block):
        found.append(Parameter(f"{linear.name}.weight", linear.shape))
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
    return (*norm_layout("norm", spec.block), head)


def lora_layout(linear: Linear, lora: LoraSpec) -> tuple[Parameter, Parameter]:
    """The two factors beside a linear module: A [in, r] and B [out, r]."""
    a = Parameter(f"{linear.name}.lora_a", (linear.inputs, lora.rank))
    return a, Parameter(f"{linear.name}.lora_b", (linear.outputs, lora.rank))
