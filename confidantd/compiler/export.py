"""A torch program to the bytes of an ONNX file, the same bytes on every run."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter._registration import ONNXRegistry

from confidantd.compiler.gemm import use_gemm
from confidantd.compiler.program import Port, Program, Traced, example_shape, free_size
from confidantd.errors import CompileError
from confidantd.models.manifest import MANIFEST_KEY

OPSET = 20  # onnxruntime 1.23, the oldest that workers run, reads opset 23 and IR 11;
IR_VERSION = 10  # these two are what the exporter writes, and are checked so that it stays so

# The exporter makes its table of some 1,000 operators anew for every program, which was a fifth
# of what compiling a request took. The tables are equal, and nobody changes them.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


def export(program: Program | Traced) -> bytes:
    """The ONNX file of a program, with its manifest in the metadata."""
    model = _traced(program) if isinstance(program, Traced) else _plain(program)
    _freeze(model, program.constants)
    use_gemm(model.model.graph)
    program = _without_unread(program, model.model.graph)
    proto = model.model_proto
    _strip(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = MANIFEST_KEY, json.dumps(_manifest(program), sort_keys=True)
    _check(program, proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _without_unread(program: Program | Traced, graph: Any) -> Program | Traced:
    """Drop inputs that nothing reads, of which for example only a size was needed.

    Releases of OpenVINO confuse the inputs that follow one of these.
    """
    unread = {v.name for v in graph.inputs if not v.uses() and not v.is_graph_output()}
    for value in [value for value in graph.inputs if value.name in unread]:
        graph.inputs.remove(value)
    inputs = tuple(port for port in program.inputs if port.name not in unread)
    return dataclasses.replace(program, inputs=inputs)


def _manifest(program: Program | Traced) -> dict[str, Any]:
    return {
        "program": program.name,
        "inputs": [dataclasses.asdict(port) for port in program.inputs],
        "outputs": [dataclasses.asdict(port) for port in program.outputs],
    }


def _call(program: Program, names: list[str], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = program.compute(dict(zip(names, arguments, strict=True)))
    return tuple(found[port.name] for port in program.outputs)


def _traced(program: Traced) -> Any:
    """A graph that is there already; fake tensors need no memory."""
    shapes = {port.name: port for port in program.inputs}
    named = [shapes.get(name) for name in program.arguments]
    with FakeTensorMode():
        arguments = tuple(
            torch.empty(program.constants[name].shape) if port is None else _example(port)
            for name, port in zip(program.arguments, named, strict=True)
        )
        free = tuple({} if port is None else _free(port) for port in named)
        return _onnx(program.graph, arguments, program, list(program.arguments), free)


def _free(port: Port) -> dict[int, Any]:
    """The free dimensions of a port, as export takes them."""
    found = {}
    for axis, size in enumerate(port.shape):
        if isinstance(size, str):
            factor, symbol = free_size(size)
            found[axis] = factor * torch.export.Dim(symbol)
    return found


def _plain(program: Program) -> Any:
    names = [*(port.name for port in program.inputs), *program.constants]
    if program.differentiates:
        return _differentiated(program, names)
    arguments = (*(_example(port) for port in program.inputs), *program.constants.values())
    free = [_free(port) for port in program.inputs]
    dynamic = ((*free, *({} for _ in program.constants)),) if any(free) else None
    return _onnx(_Module(program, names).eval(), arguments, program, names, dynamic)


def _example(port: Port) -> Tensor:
    return torch.empty(example_shape(port), dtype=getattr(torch, port.dtype))


def _differentiated(program: Program, names: list[str]) -> Any:
    """Trace first: the exporter cannot look into `vjp`. Fake tensors need no memory."""
    with FakeTensorMode():
        arguments = [_example(port) for port in program.inputs]
        arguments += [torch.empty(constant.shape) for constant in program.constants.values()]

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            return _call(program, names, values)

        trace = make_fx(flat, decomposition_table=dict(core_aten_decompositions()))
        return _onnx(trace(*arguments), tuple(arguments), program, names, None)


class _Module(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, program: Program, names: list[str]) -> None:
        super().__init__()
        self._program = program
        self._names = names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return _call(self._program, self._names, values)


def _onnx(
    module: torch.nn.Module,
    arguments: tuple[Tensor, ...],
    program: Program | Traced,
    names: list[str],
    dynamic: Any,
) -> Any:
    outputs = [port.name for port in program.outputs]
    return torch.onnx.export(
        module,
        arguments,
        input_names=names,
        output_names=outputs,
        opset_version=OPSET,
        dynamic_shapes=dynamic,
        dynamo=True,
        verbose=False,
    )


def _freeze(model: Any, constants: Mapping[str, Tensor]) -> None:
    """Turn inputs that stand for constants into initializers."""
    graph = model.model.graph
    for value in list(graph.inputs):
        if value.name in constants:
            value.const_value = onnx_ir.tensor(constants[value.name].numpy(), name=value.name)
            graph.inputs.remove(value)
            graph.register_initializer(value)


def _strip(message: Any) -> None:
    """Remove what the exporter adds for debugging: it holds paths, and differs between runs."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if hasattr(value, "__len__") else (value,):
                _strip(part)


def _check(program: Program | Traced, proto: Any) -> None:
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("", 0) > OPSET or proto.ir_version > IR_VERSION or len(opsets) != 1:
        raise CompileError(
            f"{program.name}: the exporter wrote opset {opsets}, IR {proto.ir_version}",
            "install the torch version that this release was tested with",
        )
    for kind, expected, found in (
        ("inputs", program.inputs, proto.graph.input),
        ("outputs", program.outputs, proto.graph.output),
    ):
        if [port.name for port in expected] != [value.name for value in found]:
            raise CompileError(f"{program.name}: the exporter changed the {kind}")
