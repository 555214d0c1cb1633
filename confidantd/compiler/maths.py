"""Norms, activations, rotary positions and attention as plain torch functions.

Written with operations whose derivatives the ONNX exporter can translate: no `silu`
or `gelu` (their derivatives decompose to `empty_permuted`) and no `pow` (slow in
ONNX Runtime). Shapes: B rows, S or T positions, N tokens (all positions of all rows),
D hidden, H query heads over K key-value heads, G = H / K, d head size, C cached positions.
Tokens stay a matrix [N, D] except within the attention: each product is then one plain
matrix product, which providers run fastest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from confidantd.models.layout import output_major
from confidantd.models.spec import Activation, BlockSpec

Weights = Mapping[str, Tensor]
_MASKED = -1e30  # finite, so that no row of a softmax is all infinities


def norm(x: Tensor, name: str, weights: Weights, block: BlockSpec) -> Tensor:
    """RMS norm or layer norm over the last axis."""
    weight = weights[f"{name}.weight"]
    if block.norm == "rms":
        return x * torch.rsqrt(_mean_square(x) + block.norm_epsilon) * weight
    centred = x - x.sum(-1, keepdim=True) * (1 / x.shape[-1])
    scaled = centred * torch.rsqrt(_mean_square(centred) + block.norm_epsilon)
    return scaled * weight + weights[f"{name}.bias"]


def _mean_square(x: Tensor) -> Tensor:
    """Mean of squares over the last axis, written so that its derivative is cheap.

    The derivative of x * x is two equal products and their sum; that of 2 x c - c c at a
    constant c = x is one. What is divided by the width is the sum, one number a token.
    """
    constant = x.detach()
    square = 2 * (x * constant).sum(-1, keepdim=True) - (constant * constant).sum(-1, keepdim=True)
    return square * (1 / x.shape[-1])


def linear(
    x: Tensor, name: str, weights: Weights, lora_scale: float, adapter: str | None = None
) -> Tensor:
    """x [N, in] times a matrix, plus its bias, plus the low-rank product of its adapter.

    `adapter` names the module whose factor A is read, where that is another one.
    """
    weight = weights[f"{name}.weight"]
    matrix = weight.t() if output_major(name) else weight
    bias = weights.get(f"{name}.bias")
    y = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
    if f"{name}.lora_b" in weights:
        low = x @ weights[f"{adapter or name}.lora_a"]
        y = y + (low * lora_scale) @ weights[f"{name}.lora_b"].t()
    return y


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The activation function, element by element."""
    match kind:
        case "silu":
            return x * torch.sigmoid(x)
        case "gelu":
            return x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
        case "gelu_tanh":
            inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
            return 0.5 * x * (1.0 + torch.tanh(inner))
        case "relu":
            return torch.relu(x)


def rope_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, d] of angles [T, d / 2], for `rotate`."""
    both = torch.cat([angles, angles], -1)
    return torch.cos(both), torch.sin(both)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (i, i + d / 2) of x [..., T, d] by the angle of its position and pair."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def query_key_value(
    h: Tensor, rows: int, weights: Weights, block: BlockSpec, lora_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, T, d], key and value [B, K, T, d] of the normed tokens h [N, D].

    H and K are those of the weights given: all heads, or the groups of one part.
    """
    size, groups = block.head_dim, block.heads // block.kv_heads
    if "qkv.weight" in weights:
        fused = linear(h, "qkv", weights, lora_scale)
        widths = [block.heads * size, block.kv_heads * size, block.kv_heads * size]
        q, k, v = torch.split(fused, widths, -1)
        kv_heads = block.kv_heads
    else:
        shared = "qkv" if block.fused_qkv else None  # parts of a fused product share its A
        q, k, v = (linear(h, name, weights, lora_scale, shared) for name in ("q", "k", "v"))
        kv_heads = weights["k.weight"].shape[0] // size
    return (
        _heads(q, rows, kv_heads * groups, size),
        _heads(k, rows, kv_heads, size),
        _heads(v, rows, kv_heads, size),
    )


def _heads(x: Tensor, rows: int, heads: int, size: int) -> Tensor:
    """[N, heads d] as [B, heads, T, d]."""
    return x.reshape(rows, x.shape[0] // rows, heads, size).transpose(1, 2)


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """Query [B, H, T, d], scaled, as [B, K, G T, d]: a group's heads read one key-value head."""
    groups = q.shape[1] // kv_heads
    size = q.shape[3]
    return (q * size**-0.5).reshape(q.shape[0], kv_heads, groups * q.shape[2], size)


def masked_softmax(scores: Tensor, hidden: Tensor, groups: int) -> Tensor:
    """Softmax of scores [B, K, G T, N] without the positions that `hidden` [T, N] marks."""
    rows, kv_heads, length, columns = scores.shape
    split = scores.reshape(rows, kv_heads, groups, length // groups, columns)
    weights = torch.softmax(split + torch.where(hidden, _MASKED, 0.0), -1)
    return weights.reshape(rows, kv_heads, length, columns)


def merge_heads(o: Tensor, groups: int) -> Tensor:
    """Attention output [B, K, G T, d] as tokens [N, H d]."""
    rows, kv_heads, size = o.shape[0], o.shape[1], o.shape[3]
    length = o.shape[2] // groups
    heads = o.reshape(rows, kv_heads * groups, length, size)
    return heads.transpose(1, 2).reshape(rows * length, kv_heads * groups * size)


def mlp(x: Tensor, weights: Weights, block: BlockSpec, lora_scale: float) -> Tensor:
    """The MLP of the norm of tokens x [N, D], without x itself."""
    h = norm(x, "norm2", weights, block)
    up = linear(h, "up", weights, lora_scale)
    if block.gated:
        inner = activate(linear(h, "gate", weights, lora_scale), block.activation) * up
    else:
        inner = activate(up, block.activation)
    return linear(inner, "down", weights, lora_scale)
