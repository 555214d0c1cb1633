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
    x, past = values["x"], values["past"]
    h = maths.norm(x, "norm1", values, spec)
    q, k, v = (t.transpose(1, 2) for t in maths.query_key_value(h, values, spec, 0.0))
    steps = torch.arange(x.shape[1])
    if spec.rope is not None:
        angles = (steps + past).to(torch.float32).unsqueeze(1) * values["frequencies"]
        cosine, sine = maths.rope_tables(angles)
        q, k = maths.rotate(q, cosine, sine), maths.rotate(k, cosine, sine)
    o = maths.merge_heads(_attend(maths.grouped(q, spec), k, v, values, spec), spec)
    y = maths.mlp(x + maths.linear(o, "o", values, 0.0), values, spec, 0.0)
    return {"y": y, "key": k, "value": v}


def _attend(q: Tensor, k: Tensor, v: Tensor, values: Values, spec: BlockSpec) -> Tensor:
    """Attention of q [b, K, G T, d] over the valid part of the cache and the new k and v."""
    steps, capacity = k.shape[2], values["past_key"].shape[2]
    old = q @ values["past_key"].transpose(-1, -2)
    new = q @ k.transpose(-1, -2)
    scores = torch.cat([old, new], -1) * spec.head_dim**-0.5
    position = torch.arange(steps)
    empty = (torch.arange(capacity) >= values["past"]).unsqueeze(0).expand(steps, capacity)
    later = position.unsqueeze(0) > position.unsqueeze(1)
    weights = maths.masked_softmax(scores, torch.cat([empty, later], -1), spec)
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
