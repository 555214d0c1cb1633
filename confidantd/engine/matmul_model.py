"""The bytes of an ONNX file with one MatMul of any shapes, written without the onnx package.

Protocol buffers on the wire: a field is `number << 3 | kind`, then a varint (kind 0)
or a length and bytes (kind 2). Field numbers are those of onnx.proto.
"""

from __future__ import annotations

_IR_VERSION, _OPSET, _FLOAT = 10, 20, 1


def varint(value: int) -> bytes:
    """A number, seven bits a byte."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def number_field(field: int, value: int) -> bytes:
    """A field that is a number."""
    return varint(field << 3) + varint(value)


def part_field(field: int, data: bytes) -> bytes:
    """A field that is a text, bytes or another message."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def _value(name: str, dimensions: int) -> bytes:
    """ValueInfoProto: a float tensor with free dimensions."""
    shape = b"".join(part_field(1, part_field(2, f"{name}{i}".encode())) for i in range(dimensions))
    tensor = number_field(1, _FLOAT) + part_field(2, shape)
    return part_field(1, name.encode()) + part_field(2, part_field(1, tensor))


def matmul_model() -> bytes:
    """Inputs `a` [m, k] and `b` [k, n], output `c` [m, n]."""
    node = (
        part_field(1, b"a") + part_field(1, b"b") + part_field(2, b"c") + part_field(4, b"MatMul")
    )
    graph = part_field(1, node) + part_field(2, b"matmul")
    graph += (
        part_field(11, _value("a", 2))
        + part_field(11, _value("b", 2))
        + part_field(12, _value("c", 2))
    )
    opset = part_field(1, b"") + number_field(2, _OPSET)
    return number_field(1, _IR_VERSION) + part_field(7, graph) + part_field(8, opset)
