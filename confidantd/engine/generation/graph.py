"""A stage in generation as one ONNX graph, written here: no compiler, no torch.

Hidden states are [b, T, D]: T new positions of b rows. Inputs:

- `ids` [b, T] or `x` [b, T, D];
- `last` [b], each row's last position, and `length` [], the positions of the longest row;
- `cosine` and `sine` [M, d/2], the tables of rotary positions;
- `positions` [b, T] where they are learned, or the attention cannot rotate by itself;
- `first_row` [1], the first of the T positions whose logits are wanted;
- each block's `key.<layer>` and `value.<layer>` [b, K, C, d], which are outputs, too
  (`new_key.<layer>`, ...): bound to the same memory, new positions are written in place.

Outputs: `y` [b, T, D], or `logits` [b, n, V].
"""

from __future__ import annotations

import numpy as np

from confidantd.engine import onnx_bytes
from confidantd.engine.generation.onnx_graph import Graph
from confidantd.engine.generation.quantised_nodes import quantised_product, table_rows
from confidantd.engine.generation.weights import Factors, Matrix, StageWeights
from confidantd.engine.quantised import Quantised
from confidantd.models.layout import cached_width, linears
from confidantd.models.spec import BlockSpec, ModelSpec
from confidantd.wire.stage import StageSpec

_NEWER = "new_"
_TABLES = ("cosine", "sine")
_ROTARY_MULTIPLE = 16  # of the size of a head, for attention that rotates by itself


def turned_before(block: BlockSpec) -> bool:
    """Whether queries and keys are rotated before the attention."""
    return block.rope is not None and block.head_dim % _ROTARY_MULTIPLE != 0


def needs_positions(spec: StageSpec) -> bool:
    """Whether the graph of a stage takes `positions`."""
    if spec.model.positions == "learned":
        return spec.embedding
    return turned_before(spec.model.block) and spec.past_last_layer > spec.first_layer


def stage_graph(weights: StageWeights) -> Graph:
    """The graph of a stage."""
    return _Stage(weights).made()


class _Stage:
    """Writes the graph of one stage. A hidden state is a sum of two values, (x, delta), whose
    addition is fused into the norm that reads it; delta is empty where there is none.
    """

    def __init__(self, weights: StageWeights) -> None:
        self._spec = weights.spec
        self._model: ModelSpec = weights.spec.model
        self._block: BlockSpec = weights.spec.model.block
        self._weights = weights
        self._graph = Graph()

    def made(self) -> Graph:
        """All of it."""
        spec, graph = self._spec, self._graph
        x, delta = self._begin(), ""
        layers = range(spec.first_layer, spec.past_last_layer)
        if layers:
            graph.input("last", "b", element="int32")
            graph.input("length", element="int32")
            if self._block.rope is not None:
                for name in _TABLES:
                    graph.input(name, "M", self._block.head_dim // 2)
        if needs_positions(spec):
            graph.input("positions", "b", "T", element="int64")
        for layer in layers:
            x, delta = self._layer(layer, x, delta)
        if spec.head:
            self._head(x, delta)
        else:
            graph.output("y", "b", "T", self._block.hidden)
            graph.node("Add" if delta else "Identity", (x, delta) if delta else (x,), ("y",))
        return graph

    def _begin(self) -> str:
        graph, hidden = self._graph, self._block.hidden
        if not self._spec.embedding:
            return graph.input("x", "b", "T", hidden)
        ids = graph.input("ids", "b", "T", element="int64")
        x = self._rows("embedding.weight", ids)
        if self._model.positions == "learned":
            x = graph.node("Add", (x, self._rows("positions.weight", "positions")))
        return x

    def _rows(self, name: str, indices: str) -> str:
        """Rows of a table, as float32."""
        name, table = self._weights.table(name)
        if isinstance(table, Quantised):
            return table_rows(self._graph, name, table, indices)
        rows = self._graph.node("Gather", (self._graph.weight(name, table), indices))
        if table.dtype == np.float32:
            return rows
        return self._graph.node("Cast", (rows,), to=onnx_bytes.FLOAT)

    def _layer(self, layer: int, x: str, delta: str) -> tuple[str, str]:
        h, x = self._norm(layer, "norm1", x, delta)
        h, x = self._norm(layer, "norm2", x, self._attention(layer, h))
        return x, self._mlp(layer, h)

    def _norm(self, layer: int | None, name: str, x: str, delta: str) -> tuple[str, str]:
        """The normed sum, and the sum."""
        graph, epsilon = self._graph, self._block.norm_epsilon
        vectors = [graph.weight(*found) for found in self._weights.norm(layer, name)]
        simplified = "Simplified" if self._block.norm == "rms" else ""
        if not delta:
            operator = f"{simplified}LayerNormalization"
            return graph.node(operator, (x, *vectors), epsilon=epsilon, axis=-1), x
        normed, total = graph.new(), graph.new()
        operator = f"Skip{simplified}LayerNormalization"
        outputs = (normed, "", "", total)
        graph.node(operator, (x, delta, *vectors), outputs, own=True, epsilon=epsilon)
        return normed, total

    def _attention(self, layer: int, h: str) -> str:
        graph, block = self._graph, self._block
        if block.fused_qkv:
            query, key, value = self._linear(layer, "qkv", h), "", ""
        else:
            query, key, value = (self._linear(layer, name, h) for name in "qkv")
        shape = ("b", block.kv_heads, "C", cached_width(block))
        caches = [graph.input(f"{kind}.{layer}", *shape) for kind in ("key", "value")]
        newer = [graph.output(f"{_NEWER}{name}", *shape) for name in caches]
        turns = block.rope is not None and not turned_before(block)
        if turned_before(block):
            query = self._turned(query, block.heads)
            key = self._turned(key, block.kv_heads)
        if cached_width(block) != block.head_dim:
            if block.fused_qkv:
                query, key, value = self._parted(query)
            query, key, value = (self._widened(v) for v in (query, key, value))
        found = graph.node(
            "GroupQueryAttention",
            (query, key, value, *caches, "last", "length", *(_TABLES if turns else ())),
            (graph.new(), *newer),
            own=True,
            num_heads=block.heads,
            kv_num_heads=block.kv_heads,
            do_rotary=int(turns),
            scale=block.head_dim**-0.5,
        )
        return self._linear(layer, "o", self._narrowed(found))

    def _parted(self, qkv: str) -> tuple[str, str, str]:
        """The queries, keys and values of a fused product."""
        graph, block = self._graph, self._block
        widths = np.array([block.heads, block.kv_heads, block.kv_heads]) * block.head_dim
        parts = (graph.new(), graph.new(), graph.new())
        graph.node("Split", (qkv, graph.constant(graph.new(), widths)), parts, axis=-1)
        return parts

    def _widened(self, x: str) -> str:
        """Heads [b, T, h d] with zeros up to the size that the attention takes."""
        graph, block = self._graph, self._block
        more = cached_width(block) - block.head_dim
        heads = self._reshaped(x, 0, 0, -1, block.head_dim)
        ends = graph.constant(graph.new(), np.array([0, 0, 0, 0, 0, 0, 0, more]))
        return self._reshaped(graph.node("Pad", (heads, ends)), 0, 0, -1)

    def _narrowed(self, x: str) -> str:
        """Heads without those zeros."""
        graph, block = self._graph, self._block
        if cached_width(block) == block.head_dim:
            return x
        heads = self._reshaped(x, 0, 0, block.heads, cached_width(block))
        numbers = (graph.constant(graph.new(), np.array([n])) for n in (0, block.head_dim, 3))
        return self._reshaped(graph.node("Slice", (heads, *numbers)), 0, 0, -1)

    def _reshaped(self, x: str, *shape: int) -> str:
        """A size of 0 stays as it is."""
        graph = self._graph
        return graph.node("Reshape", (x, graph.constant(graph.new(), np.array(shape))))

    def _turned(self, x: str, heads: int) -> str:
        """Queries or keys [b, T, heads d], rotated by their positions."""
        inputs = (x, "positions", *_TABLES)
        return self._graph.node("RotaryEmbedding", inputs, own=True, num_heads=heads)

    def _mlp(self, layer: int, h: str) -> str:
        up = self._linear(layer, "up", h)
        if self._block.gated:
            inner = self._activated(self._linear(layer, "gate", h))
            return self._linear(layer, "down", self._graph.node("Mul", (inner, up)))
        return self._linear(layer, "down", self._activated(up))

    def _activated(self, x: str) -> str:
        graph = self._graph
        match self._block.activation:
            case "silu":  # x sigmoid(x)
                return graph.node("QuickGelu", (x,), own=True, alpha=1.0)
            case "relu":
                return graph.node("Relu", (x,))
            case "gelu":
                return graph.node("Gelu", (x,), own=True)
            case "gelu_tanh":
                return graph.node("FastGelu", (x,), own=True)

    def _linear(self, layer: int, name: str, x: str) -> str:
        """A linear module of a block, with its bias and its adapter."""
        y = self._product(self._weights.matrix(layer, name), x)
        (bias,) = (linear.bias for linear in linears(self._block) if linear.name == name)
        if bias:
            y = self._graph.node("Add", (y, self._graph.weight(*self._weights.bias(layer, name))))
        factors = self._weights.factors(layer, name)
        return y if factors is None else self._graph.node("Add", (y, self._adapted(factors, x)))

    def _product(self, matrix: Matrix, x: str, scale: float = 1.0) -> str:
        """x W^T, or x W where the matrix is stored the other way."""
        if isinstance(matrix.array, Quantised):
            return quantised_product(self._graph, matrix.name, matrix.array, x)
        weight = self._graph.weight(matrix.name, matrix.array)
        return self._graph.node(
            "FusedMatMul", (x, weight), own=True, transB=int(matrix.output_major), alpha=scale
        )

    def _adapted(self, factors: Factors, x: str) -> str:
        return self._product(factors.b, self._product(factors.a, x), factors.scale)

    def _head(self, x: str, delta: str) -> None:
        graph = self._graph
        first = graph.input("first_row", 1, element="int64")
        end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
        axis = graph.constant("axis", np.array([1]))
        cut = [graph.node("Slice", (v, first, end, axis)) if v else "" for v in (x, delta)]
        h, _ = self._norm(None, "norm", cut[0], cut[1])
        graph.output("logits", "b", "n", self._model.vocabulary)
        graph.node("Identity", (self._product(self._weights.head(), h),), ("logits",))
