"""What a block is made of, as functions of tokens: the whole, its attention, its MLP.

A *unit* maps tokens x [N, D] and weights to tokens y [N, D]. The block includes its
residual connections. Attention and MLP are without: they are cut into parts that run on
several execution providers at once, each over a range of head groups or MLP columns, and
the sum of the parts and x is what the block computes. Each part norms x itself; the norm's
gradient is linear, so the gradients of parts add up too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from confidantd.compiler import maths
from confidantd.compiler.program import Port, Values, ports
from confidantd.models.layout import block_layout, lora_layout
from confidantd.models.parts import (
    GROUPS,
    PartParameter,
    attention_parameters,
    mlp_parameters,
)
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import BlockSpec, ProgramRequest
from confidantd.models.tensors import target_linears


@dataclass(frozen=True, slots=True)
class Unit:
    """`compute` takes the tokens `x`, the weights and the constants by name.

    `recomputes`: what the forward saves is asked for without its output, too. `accumulates`:
    the backward adds to gradients; those of parts are added by who knows which rows are whose.
    """

    name: str
    weights: tuple[Port, ...]
    trained: tuple[str, ...]
    compute: Callable[[Values], Tensor]
    constants: Values
    recomputes: bool = True
    accumulates: bool = False


def training_units(request: ProgramRequest) -> tuple[Unit, ...]:
    """The units of a training request; with `split` those of parts instead of the block."""
    if request.split:
        return (_attention_part(request), _mlp_part(request))
    return (_block(request),)


def attention(values: Values, spec: BlockSpec, rows: int, lora_scale: float) -> Tensor:
    """Exact causal attention of the norm of tokens x [N, D], over the heads of the weights."""
    h = maths.norm(values["x"], "norm1", values, spec)
    q, k, v = maths.query_key_value(h, rows, values, spec, lora_scale)
    if spec.rope is not None:
        cosine, sine = values["cosine"], values["sine"]
        q, k = maths.rotate(q, cosine, sine), maths.rotate(k, cosine, sine)
    groups = spec.heads // spec.kv_heads
    scores = maths.grouped(q, k.shape[1]) @ k.transpose(-1, -2)
    positions = torch.arange(k.shape[2])
    later = positions.unsqueeze(0) > positions.unsqueeze(1)
    o = maths.merge_heads(maths.masked_softmax(scores, later, groups) @ v, groups)
    return maths.linear(o, "o", values, lora_scale)


def block(values: Values, spec: BlockSpec, rows: int, lora_scale: float) -> Tensor:
    """One whole block over tokens x [N, D] of `rows` sequences."""
    x = values["x"] + attention(values, spec, rows, lora_scale)
    return x + maths.mlp(x, values, spec, lora_scale)


def _block(request: ProgramRequest) -> Unit:
    spec, scale = request.model.block, _scale(request)
    adapter = () if request.lora is None else _adapter_ports(request)
    layout = ports(block_layout(spec))
    return Unit(
        "block",
        (*layout, *adapter),
        _names(adapter if request.lora is not None else layout),
        lambda values: block(values, spec, request.microbatch_size, scale),
        _rope_tables(request),
        accumulates=True,
    )


def _adapter_ports(request: ProgramRequest) -> tuple[Port, ...]:
    assert request.lora is not None
    found = target_linears(request.model, request.lora.targets)
    return ports((p for linear in found for p in lora_layout(linear, request.lora)), "adapter")


def _attention_part(request: ProgramRequest) -> Unit:
    spec, scale = request.model.block, _scale(request)
    weights = part_ports(attention_parameters(request.model, request.lora))

    def compute(values: Values) -> Tensor:
        return attention(flat_groups(values, weights), spec, request.microbatch_size, scale)

    return Unit(
        "attention",
        weights,
        _trained(request, weights),
        compute,
        _rope_tables(request),
        recomputes=False,  # the MLP's input is computed again from the attention's output
    )


def _mlp_part(request: ProgramRequest) -> Unit:
    spec, scale = request.model.block, _scale(request)
    weights = part_ports(mlp_parameters(request.model, request.lora))
    return Unit(
        "mlp",
        weights,
        _trained(request, weights),
        lambda values: maths.mlp(values["x"], values, spec, scale),
        {},
    )


def part_ports(parameters: tuple[PartParameter, ...]) -> tuple[Port, ...]:
    """The weights of a part as inputs."""
    return tuple(
        Port(p.name, "adapter" if ".lora_" in p.name else "weight", p.shape) for p in parameters
    )


def flat_groups(values: Values, weights: tuple[Port, ...]) -> dict[str, Tensor]:
    """The values with weights [K, rows of a group, ...] as the matrices of all their heads."""
    by_group = {port.name for port in weights if GROUPS in port.shape}
    return {
        name: tensor.reshape(-1, *tensor.shape[2:]) if name in by_group else tensor
        for name, tensor in values.items()
    }


def _trained(request: ProgramRequest, weights: tuple[Port, ...]) -> tuple[str, ...]:
    if request.lora is None:
        return _names(weights)
    return _names(tuple(port for port in weights if port.role == "adapter"))


def _names(found: tuple[Port, ...]) -> tuple[str, ...]:
    return tuple(port.name for port in found)


def _scale(request: ProgramRequest) -> float:
    return 0.0 if request.lora is None else request.lora.scale


def _rope_tables(request: ProgramRequest) -> dict[str, Tensor]:
    spec = request.model.block
    if spec.rope is None:
        return {}
    positions = torch.arange(request.sequence_length, dtype=torch.float32)
    frequencies = torch.tensor(rope_frequencies(spec.rope, spec.head_dim))
    cosine, sine = maths.rope_tables(torch.outer(positions, frequencies))
    return {"cosine": cosine, "sine": sine}
