"""Norms, activations, rotary positions and attention as plain torch functions.

Written with operations whose derivatives the ONNX exporter can translate: no `silu`
or `gelu` (their derivatives decompose to `empty_permuted`) and no `pow` (slow in
ONNX Runtime). Shapes: B rows, S or T positions, D hidden, H query heads over K
key-value heads, G = H / K, d head size, C cached positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from confidantd.models.spec import Activation, BlockSpec, RopeSpec

Weights = Mapping[str, Tensor]
_MASKED = -1e30  # finite, so that no row of a softmax is all infinities


def norm(x: Tensor, name: str, weights: Weights, block: BlockSpec) -> Tensor:
    """RMS norm or layer norm over the last axis."""
    weight = weights[f"{name}.weight"]
    if block.norm == "rms":
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + block.norm_epsilon) * weight
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(variance + block.norm_epsilon)
    return scaled * weight + weights[f"{name}.bias"]


def linear(x: Tensor, name: str, weights: Weights, lora_scale: float) -> Tensor:
    """x W + b, and the low-rank product beside it where the module has an adapter."""
    y = x @ weights[f"{name}.weight"]
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    if f"{name}.lora_a" in weights:
        low = x @ weights[f"{name}.lora_a"]
        y = y + low @ weights[f"{name}.lora_b"] * lora_scale
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


def rope_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Inverse frequencies [d / 2], in float32 as every Llama implementation computes them.

    `llama3` stretches long wavelengths by `factor`, keeps short ones, and blends
    linearly in between (Llama 3.1's model card code).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original_max_positions / wavelengths - low) / (high - low)
    stretched = (1 - blend) * frequencies / rope.factor + blend * frequencies
    long = wavelengths > rope.original_max_positions / low
    stretched = torch.where(long, frequencies / rope.factor, stretched)
    return torch.where(wavelengths < rope.original_max_positions / high, frequencies, stretched)


def rope_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, d] of angles [T, d / 2], for `rotate`."""
    both = torch.cat([angles, angles], -1)
    return torch.cos(both), torch.sin(both)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (i, i + d / 2) of x [..., T, d] by the angle of its position and pair."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def query_key_value(
    h: Tensor, weights: Weights, block: BlockSpec, lora_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, T, H, d], key and value [B, T, K, d] of the normed input h [B, T, D]."""
    rows, length = h.shape[0], h.shape[1]
    size = block.head_dim
    if block.fused_qkv:
        fused = linear(h, "qkv", weights, lora_scale)
        ends = (block.heads * size, (block.heads + block.kv_heads) * size)
        q, k, v = fused[..., : ends[0]], fused[..., ends[0] : ends[1]], fused[..., ends[1] :]
    else:
        q, k, v = (linear(h, name, weights, lora_scale) for name in ("q", "k", "v"))
    return (
        q.reshape(rows, length, block.heads, size),
        k.reshape(rows, length, block.kv_heads, size),
        v.reshape(rows, length, block.kv_heads, size),
    )


def grouped(q: Tensor, block: BlockSpec) -> Tensor:
    """Query [B, H, T, d] as [B, K, G T, d]: a group's heads read one key-value head."""
    groups = block.heads // block.kv_heads
    return q.reshape(q.shape[0], block.kv_heads, groups * q.shape[2], block.head_dim)


def masked_softmax(scores: Tensor, hidden: Tensor, block: BlockSpec) -> Tensor:
    """Softmax of scores [B, K, G T, N] without the positions that `hidden` [T, N] marks."""
    rows, kv_heads, length, columns = scores.shape
    groups = block.heads // block.kv_heads
    split = scores.reshape(rows, kv_heads, groups, length // groups, columns)
    weights = torch.softmax(split + torch.where(hidden, _MASKED, 0.0), -1)
    return weights.reshape(rows, kv_heads, length, columns)


def merge_heads(o: Tensor, block: BlockSpec) -> Tensor:
    """Attention output [B, K, G T, d] as [B, T, H d]."""
    rows, length = o.shape[0], o.shape[2] // (block.heads // block.kv_heads)
    heads = o.reshape(rows, block.heads, length, block.head_dim)
    return heads.transpose(1, 2).reshape(rows, length, block.heads * block.head_dim)


def mlp(x: Tensor, weights: Weights, block: BlockSpec, lora_scale: float) -> Tensor:
    """x plus the MLP of its norm."""
    h = norm(x, "norm2", weights, block)
    up = linear(h, "up", weights, lora_scale)
    if block.gated:
        inner = activate(linear(h, "gate", weights, lora_scale), block.activation) * up
    else:
        inner = activate(up, block.activation)
    return x + linear(inner, "down", weights, lora_scale)
