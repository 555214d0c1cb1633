"""Cuts the traced training computation of a unit into forward, recompute and backward.

The trace computes a unit's output and, from the gradient of that, all gradients. What the
backward reads of the forward is a choice: a minimum cut decides which tensors are saved,
so that the fewest bytes are kept while no matrix product and no softmax is computed
twice; element-wise work and changes of layout are done again from what is saved, since
that costs less than writing and reading it. (The same trade as in Jain et al.,
Checkmate, 2020, and torch's own partitioner; ours never saves a weight.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

_AGAIN_COSTS_TOO_MUCH = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._softmax.default,  # noqa: SLF001 - its public name after decomposition
    }
)
_VIEW = torch.ops.aten.view.default
_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True, slots=True)
class Cut:
    """Nodes of one trace: the output y, the gradients, and what is saved between the two."""

    output: fx.Node
    gradients: tuple[fx.Node, ...]
    saved: tuple[fx.Node, ...]


def cut(graph: fx.Graph, seeds: int) -> Cut:
    """The cheapest cut of a graph whose outputs are (y, *gradients).

    The first `seeds` placeholders are gradients that only the backward gets.
    """
    output, *gradients = _outputs(graph)
    needed = _ancestors(gradients)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    backward = _descendants(graph, placeholders[:seeds])
    flow = nx.DiGraph()
    flow.add_nodes_from((_SOURCE, _SINK))
    for node in graph.nodes:
        if node in needed and node not in backward and _is_kept(node):
            _add(flow, node, backward & needed)
    saved = _nearest_cut(flow) if flow.in_degree(_SINK) else set()
    ordered = [node for node in graph.nodes if node in saved]
    return Cut(output, tuple(gradients), tuple(dict.fromkeys(map(_without_view, ordered))))


def _outputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    node = next(node for node in graph.nodes if node.op == "output")
    found: tuple[fx.Node, ...] = node.args[0]
    return found


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _descendants(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:  # in order of computation
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_kept(node: fx.Node) -> bool:
    """Inputs and sizes are there anyway: they are neither saved nor computed again."""
    return node.op == "call_function" and not isinstance(node.meta["val"], torch.SymInt | int)


def _add(flow: nx.DiGraph, node: fx.Node, readers: set[fx.Node]) -> None:
    """A node becomes an edge whose capacity is the bytes that saving it costs."""
    into, out = (node, "in"), (node, "out")
    flow.add_edge(into, out, capacity=_bytes(node))
    if node.target in _AGAIN_COSTS_TOO_MUCH:
        flow.add_edge(_SOURCE, into, capacity=float("inf"))
    else:
        for source in node.all_input_nodes:
            if _is_kept(source):
                flow.add_edge((source, "out"), into, capacity=float("inf"))
    if any(user in readers for user in node.users):
        flow.add_edge(out, _SINK, capacity=float("inf"))


def _bytes(node: fx.Node) -> float:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):  # several tensors at once: save its parts instead
        return float("inf")
    count = value.numel()
    size = count.node.hint if isinstance(count, torch.SymInt) else count
    return float(size * value.element_size())


def _nearest_cut(flow: nx.DiGraph) -> set[fx.Node]:
    """Of the cheapest cuts the one nearest to the backward: it leaves least to do again."""
    residual = nx.algorithms.flow.preflow_push(flow, _SOURCE, _SINK)
    reaching: set[Any] = {_SINK}
    waiting: list[Any] = [_SINK]
    while waiting:
        node = waiting.pop()
        for before in residual.predecessors(node):
            edge = residual[before][node]
            if before not in reaching and edge["flow"] < edge["capacity"]:
                reaching.add(before)
                waiting.append(before)
    nodes = {name[0] for name in flow.nodes if isinstance(name, tuple)}
    return {n for n in nodes if (n, "out") in reaching and (n, "in") not in reaching}


def _without_view(node: fx.Node) -> fx.Node:
    """What a change of shape reads: shapes cost nothing to change back, but copies as outputs."""
    while node.target is _VIEW and node.args[0].op == "call_function":
        node = node.args[0]
    return node


def extract(
    graph: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """The part of a graph that computes `outputs` from `inputs`."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed = _needed(outputs, set(inputs))
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule({}, part)


def _needed(outputs: Iterable[fx.Node], inputs: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node for node in outputs if node not in inputs]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [n for n in node.all_input_nodes if n not in inputs]
    return found


def used_inputs(inputs: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Those of `inputs` on which `outputs` depend, when all others are cut off too."""
    there = set(inputs)
    reached: set[fx.Node] = {node for node in outputs if node in there}
    for node in _needed(outputs, there):
        reached |= there & set(node.all_input_nodes)
    return tuple(node for node in inputs if node in reached)
