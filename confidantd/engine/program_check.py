"""What a program from a peer may hold, checked before ONNX Runtime sees it.

A program is an ONNX model that our compiler made: known operators, no functions, no data in
other files. The few fields that decide that are read from the protobuf bytes themselves (their
numbers are those of `onnx.proto`), so that no library parses what is not checked yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from confidantd.errors import CorruptFileError

MAX_PROGRAM_BYTES = 64 * 1024 * 1024  # ours have some 100 KB; gradients of wide blocks 1 MB
MAX_VARINT_BYTES, MAX_KEY = 10, 1 << 32

# Arithmetic and the moving of elements: none holds a graph, reads a file or keeps a state.
OPERATORS = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos",
    "CumSum", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gather", "GatherElements",
    "GatherND", "Gemm", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log",
    "LogSoftmax", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "OneHot", "Or", "Pow",
    "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape",
    "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice",
    "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Trilu",
    "Unsqueeze", "Where", "Xor",
})  # fmt: skip

_Field = tuple[int, int | memoryview]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


class _Model:  # field numbers of onnx.proto
    GRAPH, TRAINING, FUNCTIONS = 7, 20, 25


class _Graph:
    NODE, INITIALIZER, SPARSE = 1, 5, 15


class _Node:
    OP_TYPE, ATTRIBUTE, DOMAIN = 4, 5, 7


class _Attribute:
    TENSOR, GRAPH, TENSORS, GRAPHS, SPARSE, SPARSES = 5, 6, 10, 11, 22, 23


class _Tensor:
    EXTERNAL_DATA, DATA_LOCATION = 13, 14


@functools.cache
def check_program(path: Path) -> None:
    """`CorruptFileError` unless the file is a program as our compiler makes them."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROGRAM_BYTES + 1)
    except OSError as failure:
        raise CorruptFileError(f"the program {path} cannot be read ({failure})") from None
    try:
        check_bytes(data)
    except ValueError as failure:
        raise CorruptFileError(
            f"{path.name} is not a program this device runs: {failure}",
            "update Confidant on all devices; if this stays, do not trust where it came from",
        ) from None


def check_bytes(data: bytes) -> None:
    """`ValueError` says what is wrong with a program."""
    if len(data) > MAX_PROGRAM_BYTES:
        raise ValueError("it is too large")
    graphs = 0
    for number, value in _fields(memoryview(data)):
        if number in (_Model.TRAINING, _Model.FUNCTIONS):
            raise ValueError("it has functions of its own")
        if number == _Model.GRAPH:
            graphs += 1
            _check_graph(_part(value))
    if graphs != 1:
        raise ValueError(f"it has {graphs} graphs")


def _check_graph(data: memoryview) -> None:
    for number, value in _fields(data):
        if number == _Graph.NODE:
            _check_node(_part(value))
        elif number == _Graph.INITIALIZER:
            _check_tensor(_part(value))
        elif number == _Graph.SPARSE:
            raise ValueError("it has sparse tensors")


def _check_node(data: memoryview) -> None:
    operator = domain = ""
    for number, value in _fields(data):
        if number == _Node.OP_TYPE:
            operator = str(_part(value), "utf-8", "replace")
        elif number == _Node.DOMAIN:
            domain = str(_part(value), "utf-8", "replace")
        elif number == _Node.ATTRIBUTE:
            _check_attribute(_part(value))
    name = f"{domain}:{operator}" if domain not in ("", "ai.onnx") else operator
    if name not in OPERATORS:
        raise ValueError(f"it uses the operator {name[:64]!r}")


def _check_attribute(data: memoryview) -> None:
    for number, value in _fields(data):
        if number in (_Attribute.TENSOR, _Attribute.TENSORS):
            _check_tensor(_part(value))
        elif number in (_Attribute.GRAPH, _Attribute.GRAPHS):
            raise ValueError("it has graphs in its nodes")
        elif number in (_Attribute.SPARSE, _Attribute.SPARSES):
            raise ValueError("it has sparse tensors")


def _check_tensor(data: memoryview) -> None:
    for number, value in _fields(data):
        if number == _Tensor.EXTERNAL_DATA or (number == _Tensor.DATA_LOCATION and value != 0):
            raise ValueError("it takes data from another file")


def _part(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is damaged")  # noqa: TRY004 - of a file, not of an argument
    return value


def _fields(data: memoryview) -> Iterator[_Field]:
    """Number and value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if not 0 < key < MAX_KEY or number == 0:  # other readers cut it to 32 bits
            raise ValueError("it is damaged")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            raise ValueError("it is damaged")
        if size > len(data) - at:
            raise ValueError("it is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(MAX_VARINT_BYTES):
        if at + index >= len(data):
            raise ValueError("it is cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("it is damaged")
