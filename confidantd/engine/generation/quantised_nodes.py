"""What a graph computes with quantised matrices: products, and rows of a table."""

from __future__ import annotations

import numpy as np

from confidantd.engine import onnx_bytes
from confidantd.engine.generation.onnx_graph import Graph
from confidantd.engine.quantised import Quantised

_ACCURACY_LEVEL = 4  # what is multiplied by quantised weights has 8 bits a block, too
_SUMS = "sums"


def quantised_product(graph: Graph, name: str, matrix: Quantised, x: str) -> str:
    """x W^T. Offsets of blocks are no business of `MatMulNBits`: what they add is the product of
    each block's sum of x with its offset, in float32.
    """
    outputs, inputs = matrix.shape
    weights = (
        graph.packed_weight(f"{name}.numbers", matrix.numbers),
        graph.packed_weight(f"{name}.scales", _flat_floats(matrix.scales)),
    )
    y = graph.node(
        "MatMulNBits",
        (x, *weights),
        own=True,
        K=inputs,
        N=outputs,
        bits=matrix.format.bits,
        block_size=matrix.format.block,
        accuracy_level=_ACCURACY_LEVEL,
    )
    if matrix.offsets is None:
        return y
    offsets = graph.weight(f"{name}.offsets", matrix.offsets)
    sums = _block_sums(graph, x, matrix.format.block)
    return graph.node("Add", (y, graph.node("FusedMatMul", (sums, offsets), own=True, transB=1)))


def _flat_floats(scales: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> np.ndarray:
    """In float32, a memory map where they are one."""
    return np.require(scales, np.float32).reshape(-1)


def _block_sums(graph: Graph, x: str, block: int) -> str:
    """[b, T, blocks] of x [b, T, K], once for all matrices that it is multiplied by."""
    name = f"{x}.{_SUMS}{block}"
    if name not in graph.shared:
        graph.shared.add(name)
        shape = graph.constant(graph.new(), np.array([0, 0, -1, block]))
        axis = graph.constant(graph.new(), np.array([-1]))
        cut = graph.node("Reshape", (x, shape))
        graph.node("ReduceSum", (cut, axis), (name,), keepdims=0)
    return name


def table_rows(graph: Graph, name: str, table: Quantised, indices: str) -> str:
    """Rows [b, T, D] of a table [V, D], in float32; what is not asked for is never read."""
    numbers = _gathered(graph, f"{name}.numbers", table.numbers, indices)
    if table.format.bits == 4:
        numbers = _halves(graph, numbers, table.format.block)
    else:
        numbers = graph.node("Cast", (numbers,), to=onnx_bytes.FLOAT)
    middle = graph.constant(graph.new(), np.array(1 << (table.format.bits - 1), np.float32))
    rows = graph.node("Sub", (numbers, middle))
    scales = np.require(table.scales, np.float32)
    rows = graph.node("Mul", (rows, _column(graph, f"{name}.scales", scales, indices)))
    if table.offsets is not None:
        rows = graph.node("Add", (rows, _column(graph, f"{name}.offsets", table.offsets, indices)))
    shape = graph.constant(graph.new(), np.array([0, 0, -1]))
    return graph.node("Reshape", (rows, shape))


def _gathered(graph: Graph, name: str, array: np.ndarray, indices: str) -> str:
    return graph.node("Gather", (graph.weight(f"table.{name}", array), indices))


def _column(graph: Graph, name: str, array: np.ndarray, indices: str) -> str:
    """One number a block, beside the block's weights."""
    axis = graph.constant(graph.new(), np.array([-1]))
    return graph.node("Unsqueeze", (_gathered(graph, name, array, indices), axis))


def _halves(graph: Graph, numbers: str, block: int) -> str:
    """Bytes [b, T, blocks, n] as two numbers of 4 bits each, [b, T, blocks, 2 n] in float32."""
    sixteen = graph.constant(graph.new(), np.array(16, np.uint8))
    axis = graph.constant(graph.new(), np.array([-1]))
    shape = graph.constant(graph.new(), np.array([0, 0, -1, block]))
    part = graph.constant(graph.new(), np.array(1 / 16, np.float32))
    bytes_ = (numbers, graph.node("Mod", (numbers, sixteen)))
    whole, low = (graph.node("Cast", (value,), to=onnx_bytes.FLOAT) for value in bytes_)
    high = graph.node("Mul", (graph.node("Sub", (whole, low)), part))
    parts = [graph.node("Unsqueeze", (half, axis)) for half in (low, high)]
    return graph.node("Reshape", (graph.node("Concat", parts, axis=-1), shape))
