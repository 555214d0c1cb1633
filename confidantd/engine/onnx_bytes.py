"""Writes ONNX files without the onnx package, which workers do not have.

Protocol buffers on the wire: a field is `number << 3 | kind`, then a varint (kind 0), a length
and bytes (kind 2) or four bytes (kind 5). Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

IR_VERSION, OPSET = 10, 20  # what onnxruntime 1.23 reads
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
Size = int | str  # a text is a dimension that is free at run time
Attribute = int | float

FLOAT = 1  # TensorProto.DataType
_ELEMENTS = {"float32": FLOAT, "uint8": 2, "int32": 6, "int64": 7, "float16": 10}
_FLOAT_ATTRIBUTE, _INTEGER_ATTRIBUTE = 1, 2
_EXTERNAL = 1


def varint(value: int) -> bytes:
    """A number, seven bits a byte; a negative one as 64 bits."""
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def number_field(field: int, value: int) -> bytes:
    """A field that is a number."""
    return varint(field << 3) + varint(value)


def part_field(field: int, data: bytes | str) -> bytes:
    """A field that is a text, bytes or another message."""
    raw = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def value_info(name: str, shape: Sequence[Size], element: str = "float32") -> bytes:
    """ValueInfoProto of an input or output."""
    sizes = b"".join(
        part_field(1, number_field(1, s) if isinstance(s, int) else part_field(2, s)) for s in shape
    )
    tensor = number_field(1, _ELEMENTS[element]) + part_field(2, sizes)
    return part_field(1, name) + part_field(2, part_field(1, tensor))


def node(
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    domain: str = "",
    attributes: Mapping[str, Attribute] | None = None,
) -> bytes:
    """NodeProto; an input that is left out is an empty text."""
    found = [part_field(1, name) for name in inputs] + [part_field(2, name) for name in outputs]
    found.append(part_field(4, operator))
    found += [part_field(5, _attribute(k, v)) for k, v in (attributes or {}).items()]
    if domain:
        found.append(part_field(7, domain))
    return b"".join(found)


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        data = varint(2 << 3 | 5) + struct.pack("<f", value)
        return part_field(1, name) + data + number_field(20, _FLOAT_ATTRIBUTE)
    return part_field(1, name) + number_field(3, value) + number_field(20, _INTEGER_ATTRIBUTE)


def constant(name: str, array: NDArray[np.generic]) -> bytes:
    """TensorProto with its data."""
    return _tensor(name, array) + part_field(9, array.tobytes())


def outside(name: str, array: NDArray[np.generic]) -> bytes:
    """TensorProto whose data the session is given beside the file."""
    place = {"location": name, "offset": "0", "length": str(array.nbytes)}
    entries = [part_field(13, part_field(1, k) + part_field(2, v)) for k, v in place.items()]
    return _tensor(name, array) + b"".join(entries) + number_field(14, _EXTERNAL)


def _tensor(name: str, array: NDArray[np.generic]) -> bytes:
    sizes = b"".join(number_field(1, size) for size in array.shape)
    return sizes + number_field(2, _ELEMENTS[array.dtype.name]) + part_field(8, name)


def model(
    name: str,
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    constants: Sequence[bytes] = (),
    domains: Sequence[str] = (),
) -> bytes:
    """ModelProto; `domains` of operators that are not ONNX's own."""
    graph = b"".join(part_field(1, data) for data in nodes) + part_field(2, name)
    graph += b"".join(part_field(5, data) for data in constants)
    graph += b"".join(part_field(11, data) for data in inputs)
    graph += b"".join(part_field(12, data) for data in outputs)
    opsets = [part_field(1, "") + number_field(2, OPSET)]
    opsets += [part_field(1, domain) + number_field(2, 1) for domain in domains]
    found = number_field(1, IR_VERSION) + part_field(7, graph)
    return found + b"".join(part_field(8, opset) for opset in opsets)


def matmul_model() -> bytes:
    """A file with one product: inputs `a` [a0, a1] and `b` [b0, b1], output `c` [c0, c1]."""
    a, b, c = (value_info(name, (f"{name}0", f"{name}1")) for name in "abc")
    return model("matmul", (node("MatMul", "ab", "c"),), (a, b), (c,))
