"""The programs of generation: any batch b, length T and cache capacity C.

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
from confidantd.models.layout import block_layout, embedding_layout, head_layout
from confidantd.models.spec import BlockSpec, ModelSpec


def generation_programs(spec: ModelSpec) -> list[Program]:
    """Every program that generates with `spec`."""
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
    empty = (torch.arange(capacity) >= values["past"]).unsqueeze(0).expand(steps, capacity)
    later = position.unsqueeze(0) > position.unsqueeze(1)
    groups = spec.heads // spec.kv_heads
    weights = maths.masked_softmax(scores, torch.cat([empty, later], -1), groups)
    return weights[..., :capacity] @ values["past_value"] + weights[..., capacity:] @ v


def _block(spec: ModelSpec) -> Program:
    block = spec.block
    cache = ("b", block.kv_heads, "C", block.head_dim)
    new = ("b", block.kv_heads, "T", block.head_dim)
    constants = {}
    if block.rope is not None:
        constants["frequencies"] = maths.rope_frequencies(block.rope, block.head_dim)
    return Program(
        "block_decode",
        (
            _hidden(spec, "x"),
            Port("past_key", "cache", cache),
            Port("past_value", "cache", cache),
            _past(),
            *ports(block_layout(block)),
        ),
        (_hidden(spec, "y"), Port("key", "cache", new), Port("value", "cache", new)),
        lambda values: decode_block(values, block),
        constants,
    )


def _head(spec: ModelSpec) -> Program:
    def compute(values: Values) -> Values:
        h = maths.norm(values["x"][:, -1], "norm", values, spec.block)
        return {"logits": h @ values["head.weight"].t()}

    logits = Port("logits", "logits", ("b", spec.vocabulary))
    return Program(
        "head_logits", (_hidden(spec, "x"), *ports(head_layout(spec))), (logits,), compute
    )
