"""ONNX nodes written as arithmetic: `(a * b) ^ c` adds three nodes to the graph that is being written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph. Its operators take values and NumPy scalars or arrays of its own type; none converts."""

    name: str
    writer: "Writer" = field(repr=False)

    def __add__(self, other: Any) -> "Value":
        return self.writer("Add", self, other)

    def __sub__(self, other: Any) -> "Value":
        return self.writer("Sub", self, other)

    def __mul__(self, other: Any) -> "Value":
        return self.writer("Mul", self, other)

    def __truediv__(self, other: Any) -> "Value":
        return self.writer("Div", self, other)

    def __and__(self, other: Any) -> "Value":
        return self.writer("BitwiseAnd", self, other)

    def __xor__(self, other: Any) -> "Value":
        return self.writer("BitwiseXor", self, other)

    def __rshift__(self, other: Any) -> "Value":
        return self.writer("BitShift", self, other, direction="RIGHT")

    def __lshift__(self, other: Any) -> "Value":
        return self.writer("BitShift", self, other, direction="LEFT")

    def to(self, element: int) -> "Value":
        """As another TensorProto.DataType."""
        return self.writer("Cast", self, to=element)


class Writer:
    """Writes the nodes of one graph and of the bodies within it, in order.

    Constants are kept once, as weights of the outermost graph, where every body sees them. Their names, and
    those made up for nodes, begin with `prefix`.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._count = 0

    def __call__(self, operator: str, *operands: Any, name: str | None = None, **attributes: Any) -> Value:
        """Add a node; its one output. Operands: values, NumPy scalars or arrays, or None for one left out."""
        inputs = ["" if operand is None else self.value(operand).name for operand in operands]
        output = name or self._name(operator)
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return Value(output, self)

    def value(self, given: Any, name: str | None = None) -> Value:
        """A value as it is; an array as a constant."""
        if isinstance(given, Value):
            return given
        array = np.asarray(given)
        key = (array.dtype.str, array.shape, array.tobytes(), name)
        if key not in self._constants:
            self._constants[key] = Value(f"{self._prefix}{name}" if name else self._name("constant"), self)
            self.weights.append(numpy_helper.from_array(array, self._constants[key].name))
        return self._constants[key]

    @contextmanager
    def body(self) -> Iterator[list[NodeProto]]:
        """What is written inside goes into this list, not into the graph around it."""
        around, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = around

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self._prefix}{kind.lower()}_{self._count}"
