"""Products with a transposed matrix as `Gemm` nodes.

The exporter writes x W^T as `Transpose` and `MatMul`. As two nodes every run copies the
weight; ONNX Runtime's own fusion of the two also fuses transposed *left* operands, which
its CPU kernel multiplies 12 to 18 % slower than after an explicit transpose of the (small)
activation. So the right ones are fused here, and workers turn that fusion off. What is
added to such a product goes into it too, which saves a pass over the tokens. The sums of
gradients are the exception: their left operand is transposed, and adding within the product
saves a gradient of each weight, which is worth as much time.
"""

from __future__ import annotations

from typing import Any

import onnx_ir


def use_gemm(graph: Any) -> None:
    """Replace products whose right operand is a transposed matrix, in place."""
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
            continue
        left, right = node.inputs[0], node.inputs[1]
        producer = right.producer()
        if producer is None or not _is_transpose(producer) or _rank(left) != 2:
            continue
        if node.op_type == "Gemm" and any(
            name in node.attributes for name in ("transA", "transB", "alpha", "beta")
        ):
            continue
        _replace(graph, node, producer.inputs[0])
    for node in list(graph):
        if node.op_type == "Add" and node.domain == "" and not _fold_sum(graph, node):
            _fold(graph, node)


def _is_transpose(node: Any) -> bool:
    return bool(
        node.op_type == "Transpose"
        and tuple(node.attributes["perm"].as_ints()) == (1, 0)
        and _rank(node.inputs[0]) in (2, None)
    )


def _rank(value: Any) -> int | None:
    return None if value.shape is None else len(value.shape)


def _replace(graph: Any, node: Any, right: Any) -> None:
    bias = node.inputs[2:]
    gemm = onnx_ir.node("Gemm", [node.inputs[0], right, *bias], {"transB": 1})
    made, old = gemm.outputs[0], node.outputs[0]
    made.name, made.shape, made.type = old.name, old.shape, old.type
    graph.insert_before(node, gemm)
    transpose = node.inputs[1].producer()
    onnx_ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if not list(transpose.outputs[0].uses()) and not transpose.outputs[0].is_graph_output():
        graph.remove(transpose, safe=True)


def _fold(graph: Any, add: Any) -> None:
    """Turn `Add(Gemm(a, b), c)` into `Gemm(a, b, c)` where c has the product's shape."""
    for product, other in (add.inputs, reversed(add.inputs)):
        gemm = product.producer()
        if gemm is None or not _may_take(gemm, product, other):
            continue
        made = onnx_ir.node("Gemm", [*gemm.inputs, other], {"transB": 1})
        out, old = made.outputs[0], add.outputs[0]
        out.name, out.shape, out.type = old.name, old.shape, old.type
        graph.insert_before(add, made)
        onnx_ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        graph.remove([add, gemm], safe=True)
        return


def _fold_sum(graph: Any, add: Any) -> bool:
    """Turn `Add(MatMul(a, b), c)` with an input c, a sum so far, into `Gemm(a, b, c)`: it adds
    where c lies, if the engine lets c and the output be the same memory.
    """
    for product, other in (add.inputs, reversed(add.inputs)):
        node = product.producer()
        if node is None or node.op_type != "MatMul" or not other.is_graph_input():
            continue
        if product.shape != other.shape or _rank(product) != 2 or len(list(product.uses())) != 1:
            continue
        made = onnx_ir.node("Gemm", [*node.inputs, other])
        out, old = made.outputs[0], add.outputs[0]
        out.name, out.shape, out.type = old.name, old.shape, old.type
        graph.insert_before(add, made)
        onnx_ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        graph.remove([add, node], safe=True)
        return True
    return False


def _may_take(gemm: Any, product: Any, other: Any) -> bool:
    """A product of ours without a third operand, which is used only here."""
    return bool(
        gemm.op_type == "Gemm"
        and set(gemm.attributes) == {"transB"}
        and gemm.attributes["transB"].as_int() == 1
        and len(gemm.inputs) == 2
        and len(list(product.uses())) == 1
        and not product.is_graph_output()
        and product.shape is not None
        and product.shape == other.shape
        and other is not product
    )
