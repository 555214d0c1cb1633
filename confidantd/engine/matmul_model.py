"""The bytes of an ONNX file with one MatMul of any shapes, written without the onnx package.

Protocol buffers on the wire: a field is `number << 3 | kind`, then a varint (kind 0)
or a length and bytes (kind 2). Field numbers are those of onnx.proto.
"""

from __future__ import annotations

_IR_VERSION, _OPSET, _FLOAT = 10, 20, 1


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _value(name: str, dimensions: int) -> bytes:
    """ValueInfoProto: a float tensor with free dimensions."""
    shape = b"".join(_part(1, _part(2, f"{name}{i}".encode())) for i in range(dimensions))
    tensor = _number(1, _FLOAT) + _part(2, shape)
    return _part(1, name.encode()) + _part(2, _part(1, tensor))


def matmul_model() -> bytes:
    """Inputs `a` [m, k] and `b` [k, n], output `c` [m, n]."""
    node = _part(1, b"a") + _part(1, b"b") + _part(2, b"c") + _part(4, b"MatMul")
    graph = _part(1, node) + _part(2, b"matmul")
    graph += _part(11, _value("a", 2)) + _part(11, _value("b", 2)) + _part(12, _value("c", 2))
    opset = _part(1, b"") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _part(7, graph) + _part(8, opset)
