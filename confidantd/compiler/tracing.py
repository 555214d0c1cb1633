"""Traces a unit and its backward pass, and makes its three programs of the trace.

`<unit>_forward` gives y and what is saved; `<unit>_recompute` gives what is saved from the
inputs and the hidden state in the middle; `<unit>_backward` takes the gradient of y, what
is saved, and gives all gradients. Keeping what the forward saved is the *saved* form;
keeping of it only the middle, and running `recompute` right before `backward`, is the
*recompute* form. The backward of a unit that *accumulates* takes the gradients of weights so
far as `sum.<weight>` and gives the new sums.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from confidantd.compiler.program import Port, Traced, Values, example_shape
from confidantd.compiler.saving import cut, extract, used_inputs
from confidantd.compiler.units import Unit
from confidantd.models.spec import ProgramRequest

SAVED = "saved."
SUM = "sum."


def unit_programs(unit: Unit, request: ProgramRequest) -> list[Traced]:
    """Forward, recompute and backward of one unit."""
    tokens = (request.microbatch_size * request.sequence_length, request.model.block.hidden)
    x, dy = Port("x", "activation", tokens), Port("dy", "gradient", tokens)
    sums = _sum_ports(unit)
    inputs = (dy, *sums, x, *unit.weights, *_constant_ports(unit.constants))
    graph = _trace_unit(unit, inputs)
    ports_of = dict(zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True))
    found = cut(graph, seeds=1 + len(sums))
    free = {size for port in unit.weights for size in port.shape if isinstance(size, str)}
    saved = {node: _saved_port(i, node, *free) for i, node in enumerate(found.saved)}
    gradients = [Port("dx", "gradient", tokens)]
    trained = {port.name: port for port in unit.weights if port.name in unit.trained}
    gradients += [Port(f"gradient.{n}", "gradient", trained[n].shape) for n in unit.trained]
    kept = tuple(saved.items())
    name, constants = unit.name, unit.constants
    outputs = ((found.output, Port("y", "activation", tokens)), *kept)
    programs = [_program(f"{name}_forward", graph, ports_of, outputs, constants)]
    if unit.recomputes:
        held = {node: port for node, port in kept if _is_residual(node, tokens)}
        rest = tuple((node, port) for node, port in kept if node not in held)
        recompute = f"{name}_recompute"
        programs.append(_program(recompute, graph, ports_of | held, rest, constants))
    outputs = tuple(zip(found.gradients, gradients, strict=True))
    return [*programs, _program(f"{name}_backward", graph, ports_of | saved, outputs, constants)]


def _is_residual(node: fx.Node, tokens: tuple[int, int]) -> bool:
    """The hidden state between attention and MLP (with a layer norm, less its mean): as small
    as a block's input, and with it the output projection need not be computed again.
    """
    sums = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
    return node.target in sums and tuple(node.meta["val"].shape) == tokens


def _sum_ports(unit: Unit) -> tuple[Port, ...]:
    """Where a unit's gradients so far come in."""
    if not unit.accumulates:
        return ()
    shapes = {port.name: port.shape for port in unit.weights}
    return tuple(Port(f"{SUM}{name}", "gradient", shapes[name]) for name in unit.trained)


def _constant_ports(constants: Mapping[str, Tensor]) -> tuple[Port, ...]:
    return tuple(Port(name, "weight", tuple(t.shape)) for name, t in constants.items())


def _saved_port(index: int, node: fx.Node, symbol: str = "") -> Port:
    shape = tuple(
        size if isinstance(size, int) else f"{_factor(size)}*{symbol}".removeprefix("1*")
        for size in node.meta["val"].shape
    )
    return Port(f"{SAVED}{index}", "saved", shape)


def _factor(size: torch.SymInt) -> int:
    """Every size is a multiple of the one free dimension."""
    expression = size.node.expr
    (symbol,) = expression.free_symbols
    factor = sympy.simplify(expression / symbol)
    assert factor.is_integer, f"a size {expression} is no multiple of {symbol}"
    return int(factor)


def _program(
    name: str,
    graph: fx.Graph,
    there: Mapping[fx.Node, Port],
    outputs: tuple[tuple[fx.Node, Port], ...],
    constants: Mapping[str, Tensor],
) -> Traced:
    """A program with just the inputs that it reads."""
    nodes = [node for node, _ in outputs]
    used = used_inputs(tuple(there), nodes)
    names = [there[node].name for node in used]
    return Traced(
        name=name,
        inputs=tuple(there[node] for node in used if there[node].name not in constants),
        outputs=tuple(port for _, port in outputs),
        graph=extract(graph, used, nodes),
        arguments=tuple(names),
        constants={key: value for key, value in constants.items() if key in names},
    )


def _trace_unit(unit: Unit, inputs: tuple[Port, ...]) -> fx.Graph:
    """The graph of (y, dx, gradients of what is trained)."""

    def both(given: Values) -> tuple[Tensor, ...]:
        moving = {name: given[name] for name in ("x", *unit.trained)}
        found: Any = torch.func.vjp(lambda m: unit.compute({**given, **m}), moving)
        (gradients,) = found[1](given["dy"])
        sums = [given.get(f"{SUM}{name}") for name in moving]
        return (found[0], *(_added(gradients[n], s) for n, s in zip(moving, sums, strict=True)))

    return trace(both, inputs)


def _added(gradient: Tensor, before: Tensor | None) -> Tensor:
    return gradient if before is None else gradient + before


def trace(compute: Callable[[Values], tuple[Tensor, ...]], inputs: tuple[Port, ...]) -> fx.Graph:
    """The graph of a function of named tensors, which may differentiate.

    At most one free dimension. Fake tensors need no memory.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    arguments = [_fake(mode, port) for port in inputs]
    names = [port.name for port in inputs]

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        return compute(dict(zip(names, values, strict=True)))

    with mode:
        traced = make_fx(flat, decomposition_table=dict(core_aten_decompositions()))(*arguments)
        _drop_detach(traced.graph)
        graph = fx_graph_cse(traced.graph)
    _sizes_from_inputs(graph)
    return graph


def whole_program(
    name: str,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    compute: Callable[[Values], Values],
) -> Traced:
    """One program of a function that differentiates."""
    graph = trace(lambda values: tuple(compute(values)[p.name] for p in outputs), inputs)
    there = dict(zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True))
    (found,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return _program(name, graph, there, tuple(zip(found, outputs, strict=True)), {})


def _fake(mode: FakeTensorMode, port: Port) -> Tensor:
    """A fake tensor whose free dimensions are symbols."""
    kinds = [DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in port.shape]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    found: Tensor = mode.from_tensor(
        torch.empty(example_shape(port), dtype=getattr(torch, port.dtype)),
        symbolic_context=context,
    )  # never written to, so it takes no memory
    return found


def _drop_detach(graph: fx.Graph) -> None:
    """A traced gradient is final: what was constant to it may be the same tensor again."""
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _sizes_from_inputs(graph: fx.Graph) -> None:
    """Compute every size from an input's: else a size would tie the backward to the tensor it
    was read from. There is one free dimension, so every size is a multiple of it.
    """
    symbol: fx.Node | None = None
    multiples: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        factor = _factor(value)
        if symbol is None:
            assert factor == 1
            assert node.all_input_nodes[0].op == "placeholder"
            symbol = multiples[1] = node
            continue
        if factor not in multiples:
            with graph.inserting_after(symbol):
                multiples[factor] = graph.call_function(operator.mul, (symbol, factor))
            multiples[factor].meta["val"] = value
        node.replace_all_uses_with(multiples[factor])
    graph.eliminate_dead_code()
