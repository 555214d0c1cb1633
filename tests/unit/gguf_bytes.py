"""GGUF files byte by byte, good ones and others; their weights are zeros."""

from __future__ import annotations

import struct
from typing import Any

F32, Q4_0, Q8_0, Q4_K, Q6_K = 0, 2, 8, 12, 14
WIDTH, LAYERS, VOCABULARY = 64, 2, 40
SETTINGS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {
    "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64),
    "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64),
    "ffn_down": (64, 96),
}  # fmt: skip
Tensors = dict[str, tuple[int, tuple[int, ...]]]


def text(value: str) -> bytes:
    """A string as it lies in a file."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(given: Any) -> bytes:
    """A value with its type."""
    match given:
        case bool():
            return struct.pack("<I?", 7, given)
        case int():
            return struct.pack("<II", 4, given)
        case float():
            return struct.pack("<If", 6, given)
        case str():
            return struct.pack("<I", 8) + text(given)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(given)) + b"".join(map(text, given))
        case list():
            return struct.pack("<IIQ", 9, 4, len(given)) + struct.pack(f"<{len(given)}I", *given)
    raise AssertionError(given)


def tensors_of(kind: int = Q8_0, **kinds: int) -> Tensors:
    """Types and shapes of the tensors of a model; norms are in float32."""
    found: Tensors = {
        "token_embd.weight": (kinds.get("token_embd", kind), (VOCABULARY, WIDTH)),
        "output_norm.weight": (F32, (WIDTH,)),
        "output.weight": (kinds.get("output", kind), (VOCABULARY, WIDTH)),
    }
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            its = F32 if len(shape) == 1 else kinds.get(name, kind)
            found[f"blk.{layer}.{name}.weight"] = (its, shape)
    return found


def sizes(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    block, bytes_ = {F32: (1, 4), Q4_0: (32, 18), Q8_0: (32, 34)}.get(kind, (1, 0))
    count = 1
    for size in shape:
        count *= size
    return count // block * bytes_


def content(settings: dict[str, Any], tensors: Tensors, data: bytes | None = None) -> bytes:
    """A whole file, of zeros but for `data`, those of its last tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    for key, setting in settings.items():
        head += text(key) + value(setting)
    end = 0
    for name, (kind, shape) in tensors.items():
        end += -end % 32
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, end)
        end += sizes(kind, shape)
    body = bytes(end) if data is None else bytes(end - len(data)) + data
    return head + bytes(-len(head) % 32) + body
