"""Makes hostile inputs from good ones: bytes that are changed, and values inside that are."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

WEIRD_NUMBERS = (
    0, -1, 1, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1, -(2**63),
    0.0, -0.5, 1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
WEIRD_TEXTS = (
    "", " ", "\x00", "\x1b[2J", "\u202e", "../../etc/passwd", "/dev/zero", "a" * 5_000, "0" * 64,
    "\ud800", "NaN", "1e999", "%s%n", "é" * 100, "\n", "true",
)  # fmt: skip
WEIRD = (*WEIRD_NUMBERS, *WEIRD_TEXTS, b"", b"\xff" * 100, None, True, [], {}, [[]], {"": {}})
MOST_BYTES = 200_000
DEEP = 3_000
Reader = Callable[[bytes], Any]
Writer = Callable[[Any], bytes]


def changed_bytes(seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """One of the seeds, with some of its bytes changed, moved, doubled or cut."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 2:
                del data[at : at + draw.randrange(1, 9)]
            case 3:
                data[at : at + 4] = draw.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "big")
            case 4:
                other = draw.choice(seeds)
                data[at:] = other[draw.randrange(len(other) + 1) :]
            case 5:
                data[at:at] = data[at : at + draw.randrange(1, 65)] * draw.randrange(1, 20)
            case 6:
                del data[at:]
            case _:
                data[at : at + 1] = bytes([draw.choice(b'\x00\xff\x80\x7f{}[]",:=\n\x81\xc1\xdf')])
    return bytes(data[:MOST_BYTES])


def changed_value(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it replaced, left out, doubled or nested deeply."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        made = dict(value)
        match draw.randrange(8):
            case 0:
                del made[key]
            case 1:
                made[str(draw.choice(WEIRD_TEXTS))] = made[key]
            case _:
                made[key] = changed_value(made[key], draw)
        return made
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        match draw.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + [value[at]] * draw.choice((1, 20, 700))
            case _:
                return [*value[:at], changed_value(value[at], draw), *value[at + 1 :]]
    if draw.random() < 0.02:
        return nested(draw.choice((20, 200, DEEP)))
    return draw.choice(WEIRD)


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mixed(
    seeds: Sequence[bytes],
    draw: random.Random,
    read: Reader | None = None,
    write: Writer | None = None,
) -> bytes:
    """A hostile input: half of them bytes, half of them values where there is a way to
    read and write those.
    """
    if read is None or write is None or draw.random() < 0.4:
        return changed_bytes(seeds, draw)
    value = read(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = changed_value(value, draw)
    try:
        return write(value)[:MOST_BYTES]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return changed_bytes(seeds, draw)  # it cannot even be written


def read_msgpack(data: bytes) -> Any:
    """As the wire's messages are."""
    return msgpack.unpackb(data, raw=False)


def write_msgpack(value: Any) -> bytes:
    """The bytes of a value."""
    made: bytes = msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass")
    return made


def read_json(data: bytes) -> Any:
    """As config files are."""
    return json.loads(data)


def write_json(value: Any) -> bytes:
    """The bytes of a value."""
    return json.dumps(value, default=repr).encode(errors="surrogatepass")
