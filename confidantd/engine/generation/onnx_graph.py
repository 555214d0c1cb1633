"""An ONNX graph while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from confidantd.engine import onnx_bytes
from confidantd.engine.onnx_bytes import MICROSOFT, Attribute, Size
from confidantd.engine.tensors import Array


@dataclass(slots=True)
class Graph:
    """A graph so far: its parts as bytes, and the weights it is given beside the file.

    `bound` weights are inputs, so that they are read where they lie. ONNX Runtime copies those of
    `packed`, which are initializers, into an order of its own. `shared`: names of values that
    several nodes read, once they are there.
    """

    nodes: list[bytes] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)
    constants: list[bytes] = field(default_factory=list)
    bound: dict[str, Array] = field(default_factory=dict)
    packed: dict[str, Array] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    _names: int = 0

    def file(self) -> bytes:
        """The ONNX file."""
        domains = (MICROSOFT,)
        return onnx_bytes.model(
            "stage", self.nodes, self.inputs, self.outputs, self.constants, domains
        )

    def input(self, name: str, *shape: Size, element: str = "float32") -> str:
        """A new input."""
        self.inputs.append(onnx_bytes.value_info(name, shape, element))
        return name

    def output(self, name: str, *shape: Size) -> str:
        """A new output, for a node to give."""
        self.outputs.append(onnx_bytes.value_info(name, shape))
        return name

    def weight(self, name: str, array: Array) -> str:
        """A weight; the same name twice is one."""
        if name not in self.bound:
            self.bound[name] = array
            self.input(name, *array.shape, element=array.dtype.name)
        return name

    def packed_weight(self, name: str, array: Array) -> str:
        """A weight of a product that ONNX Runtime packs."""
        self.packed[name] = array
        self.constants.append(onnx_bytes.outside(name, array))
        return name

    def constant(self, name: str, array: Array) -> str:
        """Small numbers that belong to the graph."""
        self.constants.append(onnx_bytes.constant(name, array))
        return name

    def new(self) -> str:
        """A name for a value in between."""
        self._names += 1
        return f"v{self._names}"

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        own: bool = False,
        **attributes: Attribute,
    ) -> str:
        """A node, `own` of ONNX Runtime; gives the name of its first output."""
        outputs = outputs or (self.new(),)
        domain = MICROSOFT if own else ""
        self.nodes.append(onnx_bytes.node(operator, inputs, outputs, domain, attributes))
        return outputs[0]
