"""The programs of generation: any batch b, length T and cache capacity C.

Parts of a block take any number K of head groups, or M of MLP columns, too.

The cache of a block is a buffer [b, K, C, d] of which the first `past` positions are
valid; a program returns the keys and values of its T new positions, and the engine
writes them behind the valid ones. So nothing of the cache is copied in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from confidantd.compiler import maths
from confidantd.compiler.program import Port, Program, Values, ports
from confidantd.compiler.units import flat_groups, part_ports
from confidantd.models.layout import block_layout, embedding_layout, head_layout
from confidantd.models.parts import GROUPS, attention_parameters, mlp_parameters
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import BlockSpec, ModelSpec, ProgramRequest


def generation_programs(request: ProgramRequest) -> list[Program]:
    """Every program of the request."""
    spec = request.model
    if request.split:
        return [_attention_part(spec), _mlp_part(spec)]
    return [_embedding(spec), _block(spec), _head(spec)]


def _hidden(spec: ModelSpec, name: str) -> Port:
    return Port(name, "activation", ("b", "T", spec.block.hidden))


def _past() -> Port:
    return Port("past", "position", (), "int64")


def _embedding(spec: ModelSpec) -> Program:
    learned = spec.positions == "learned"

    def compute(values: Values) -> Values:
        y = functional.embedding(values["ids"], values["embedding.weight"])
        if learned:
            positions = torch.arange(values["ids"].shape[1]) + values["past"]
            y = y + functional.embedding(positions, values["positions.weight"])
        return {"y": y}

    ids = Port("ids", "ids", ("b", "T"), "int64")
    inputs = (ids, *((_past(),) if learned else ()), *ports(embedding_layout(spec)))
    return Program("embedding_decode", inputs, (_hidden(spec, "y"),), compute)


def decode_block(values: Values, spec: BlockSpec) -> Values:
    """One block over T positions that follow `past` cached ones."""
    x = values["x"]
    tokens = x.reshape(-1, spec.hidden)
    o, k, v = decode_attention({**values, "x": tokens}, spec, x.shape[0])
    tokens = tokens + o
    y = tokens + maths.mlp(tokens, values, spec, 0.0)
    return {"y": y.reshape(x.shape), "key": k, "value": v}


def decode_attention(values: Values, spec: BlockSpec, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output [N, D] of tokens x [N, D], and their keys and values [b, K, T, d]."""
    h = maths.norm(values["x"], "norm1", values, spec)
    q, k, v = maths.query_key_value(h, rows, values, spec, 0.0)
    if spec.rope is not None:
        positions = torch.arange(k.shape[2]) + values["past"]
        angles = positions.to(torch.float32).unsqueeze(1) * values["frequencies"]
        cosine, sine = maths.rope_tables(angles)
        q, k = maths.rotate(q, cosine, sine), maths.rotate(k, cosine, sine)
    o = maths.merge_heads(_attend(q, k, v, values, spec), spec.heads // spec.kv_heads)
    return maths.linear(o, "o", values, 0.0), k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, values: Values, spec: BlockSpec) -> Tensor:
    """Attention of q [b, H, T, d] over the valid part of the cache and the new k and v."""
    steps, capacity = k.shape[2], values["past_key"].shape[2]
    q = maths.grouped(q, k.shape[1])
    scores = torch.cat([q @ values["past_key"].transpose(-1, -2), q @ k.transpose(-1, -2)], -1)
    position = torch.arange(steps)
    # not `>=`: one of OpenVINO's builds has no such operator
    empty = (torch.arange(1, capacity + 1) > values["past"]).unsqueeze(0).expand(steps, capacity)
    later = position.unsqueeze(0) > position.unsqueeze(1)
    groups = spec.heads // spec.kv_heads
    weights = maths.masked_softmax(scores, torch.cat([empty, later], -1), groups)
    return weights[..., :capacity] @ values["past_value"] + weights[..., capacity:] @ v


def _block(spec: ModelSpec) -> Program:
    block, weights = spec.block, ports(block_layout(spec.block))
    return Program(
        "block_decode",
        (_hidden(spec, "x"), *_cache(block, block.kv_heads), *weights),
        (_hidden(spec, "y"), *_new(block, block.kv_heads)),
        lambda values: decode_block(values, block),
        _frequencies(block),
    )


def _cache(block: BlockSpec, kv_heads: int | str) -> tuple[Port, ...]:
    shape = ("b", kv_heads, "C", block.head_dim)
    return Port("past_key", "cache", shape), Port("past_value", "cache", shape), _past()


def _new(block: BlockSpec, kv_heads: int | str) -> tuple[Port, ...]:
    shape = ("b", kv_heads, "T", block.head_dim)
    return Port("key", "cache", shape), Port("value", "cache", shape)


def _frequencies(block: BlockSpec) -> dict[str, Tensor]:
    if block.rope is None:
        return {}
    return {"frequencies": torch.tensor(rope_frequencies(block.rope, block.head_dim))}


def _attention_part(spec: ModelSpec) -> Program:
    """The attention of some head groups and their cache, without the residual."""
    block, weights = spec.block, part_ports(attention_parameters(spec, None))

    def compute(values: Values) -> Values:
        x = values["x"]
        flat = {**flat_groups(values, weights), "x": x.reshape(-1, block.hidden)}
        o, k, v = decode_attention(flat, block, x.shape[0])
        return {"y": o.reshape(x.shape), "key": k, "value": v}

    inputs = (_hidden(spec, "x"), *_cache(block, GROUPS), *weights)
    outputs = (_hidden(spec, "y"), *_new(block, GROUPS))
    return Program("attention_decode", inputs, outputs, compute, _frequencies(block))


def _mlp_part(spec: ModelSpec) -> Program:
    """The MLP over some columns, without the residual."""
    block, weights = spec.block, part_ports(mlp_parameters(spec, None))

    def compute(values: Values) -> Values:
        x = values["x"]
        y = maths.mlp(x.reshape(-1, block.hidden), values, block, 0.0)
        return {"y": y.reshape(x.shape)}

    inputs, outputs = (_hidden(spec, "x"), *weights), (_hidden(spec, "y"),)
    return Program("mlp_decode", inputs, outputs, compute)


def _head(spec: ModelSpec) -> Program:
    def compute(values: Values) -> Values:
        h = maths.norm(values["x"][:, -1], "norm", values, spec.block)
        return {"logits": h @ values["head.weight"].t()}

    logits = Port("logits", "logits", ("b", spec.vocabulary))
    return Program(
        "head_logits", (_hidden(spec, "x"), *ports(head_layout(spec))), (logits,), compute
    )
