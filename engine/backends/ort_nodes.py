"""The graph of an ONNX model as it lies in its file, for putting operators of this package in the place of its nodes.

Only what is replaced is written anew: weights stay where they are, also in a file of their own.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from sdedit.protobuf import Value, field, fields, text, varint

DOMAIN = "sdedit"  # of the operators
NODE, INITIALIZER, OUTPUT = 1, 5, 12  # of a GraphProto
FLOAT, INT64 = 1, 7  # of a TensorProto's data_type
HALVES = (None, "fp16", "bf16")  # of the attribute `half` of a Conv


class Node:
    """A NodeProto."""

    def __init__(self, data: Value) -> None:
        self.data = data
        self.inputs, self.outputs = [], []
        operator = domain = ""
        self._attributes: list[Value] = []
        for number, value in fields(data):
            match number:  # of a NodeProto
                case 1:
                    self.inputs.append(text(value))
                case 2:
                    self.outputs.append(text(value))
                case 4:
                    operator = text(value)
                case 5:
                    self._attributes.append(value)
                case 7:
                    domain = text(value)
        self.operator = operator if domain in ("", "ai.onnx") else f"{domain}.{operator}"

    @property
    def output(self) -> str:
        return self.outputs[0]

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """An attribute that is one integer, or several."""
        parts = self._attribute(name)
        return _integers(parts, 3) or _integers(parts, 8) or default

    def number(self, name: str, default: float) -> float:
        """An attribute that is a float."""
        values = struct.unpack("<f", _joined(self._attribute(name), 2) or struct.pack("<f", default))
        return float(values[0])

    def text(self, name: str, default: str) -> str:
        """An attribute that is text."""
        return _joined(self._attribute(name), 4).decode() or default

    def _attribute(self, name: str) -> list[tuple[int, Value]]:
        """The fields of an AttributeProto: 1 is its name, 2 a float, 3 an integer, 4 text, 8 integers."""
        for attribute in self._attributes:
            parts = list(fields(attribute))
            if _joined(parts, 1) == name.encode():
                return parts
        return []

    @property
    def has_graphs(self) -> bool:
        """Whether an attribute is a graph, or several."""
        return any(number in (6, 11) for attribute in self._attributes for number, _ in fields(attribute))


@dataclass
class Constant:
    """A TensorProto; its values where it holds them itself."""

    dims: tuple[int, ...]
    element: int
    data: Value

    @property
    def is_of_channels(self) -> bool:
        """Whether it is (c, 1 ...) in float32."""
        return self.element == FLOAT and len(self.dims) > 1 and set(self.dims[1:]) == {1}

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Of float32 and int64; nothing for others, and for those that lie in another file."""
        parts = list(fields(self.data))
        if self.element == INT64:
            return _integers(parts, 7) or tuple(value for (value,) in struct.iter_unpack("<q", _joined(parts, 9)))
        if self.element == FLOAT:
            return tuple(value for (value,) in struct.iter_unpack("<f", _joined(parts, 4) or _joined(parts, 9)))
        return ()


@dataclass
class Operator:
    """One of this package's, in the place of a node."""

    name: str
    inputs: Sequence[str]
    output: str
    attributes: dict[str, float | tuple[int, ...]]

    @property
    def data(self) -> bytes:
        """A NodeProto."""
        parts = [field(1, name.encode()) for name in self.inputs]
        parts += [field(2, self.output.encode()), field(4, self.name.encode()), field(7, DOMAIN.encode())]
        return b"".join([*parts, *(field(5, _attribute(name, value)) for name, value in self.attributes.items())])


class Graph:
    """A GraphProto: its nodes, in their order, and who makes and uses what."""

    def __init__(self, data: Value, half: str | None) -> None:
        self.half, self.has_convolution = half, False
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self.fused: dict[int, Operator] = {}  # id of the last node of a match -> what stands in its place
        self._rest: list[tuple[int, Value]] = []
        self._kept: set[str] = set()
        for number, value in fields(data):
            if number == NODE:
                self.nodes.append(Node(value))
                continue
            self._rest.append((number, value))
            if number == INITIALIZER:
                parts = list(fields(value))
                name = text(next(v for n, v in parts if n == 8))
                element = next(v for n, v in parts if n == 2 and isinstance(v, int))
                self.constants[name] = Constant(_integers(parts, 1), element, value)
            elif number == OUTPUT:
                self._kept.add(text(next(v for n, v in fields(value) if n == 1)))
        self._makers = {name: node for node in self.nodes for name in node.outputs}
        self._users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)

    def maker(self, name: str, *operators: str) -> Node | None:
        """The node that makes this, if it is one of these."""
        node = self._makers.get(name)
        return node if node is not None and node.operator in operators else None

    def user(self, node: Node | None, *operators: str) -> Node | None:
        """The one node that uses what this one makes, if it is one of these and nothing stands in its place."""
        if node is None or node.output in self._kept:
            return None
        match self._users.get(node.output, []):
            case [user] if user.operator in operators and id(user) not in self.fused:
                return user
        return None

    def values(self, name: str) -> tuple[float, ...]:
        """Of a constant; none where it is not known."""
        return self.constants[name].values if name in self.constants else ()

    def replace(self, last: Node, operator: str, inputs: Sequence[str], **attributes: float | tuple[int, ...]) -> None:
        """Have this operator make what `last` makes. What nobody uses then is left out."""
        self.fused[id(last)] = Operator(operator, inputs, last.output, attributes)

    def convolve(self, last: Node, inputs: Sequence[str], pads: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """`replace`, by a convolution: of x and weights, perhaps of a bias, perhaps of what is added."""
        self.has_convolution = True
        self.replace(last, "Conv", inputs, pads=pads, strides=strides, half=(HALVES.index(self.half),))

    def live(self) -> Iterator[tuple[Node, Node | Operator]]:
        """The nodes that are needed, the last first, each with what stands in its place."""
        used = set(self._kept)
        for node in reversed(self.nodes):
            if not used.isdisjoint(node.outputs):
                one = self.fused.get(id(node), node)
                used.update(one.inputs)
                yield node, one

    def written(self) -> bytes:
        written: list[bytes] = []
        for _, one in self.live():
            assert not isinstance(one.data, int)
            written.append(field(NODE, one.data))
        return b"".join([*reversed(written), *(field(number, value) for number, value in self._rest)])


def _joined(parts: Sequence[tuple[int, Value]], wanted: int) -> bytes:
    """The bytes of a field, or of all fields of this number."""
    return b"".join(value for number, value in parts if number == wanted and not isinstance(value, int))


def _integers(parts: Sequence[tuple[int, Value]], wanted: int) -> tuple[int, ...]:
    """The signed integers of a repeated field, packed or not."""

    def found() -> Iterator[int]:
        for number, value in parts:
            if number == wanted and isinstance(value, int):
                yield value
            elif number == wanted and not isinstance(value, int):
                at = 0
                while at < len(value):
                    one, at = varint(value, at)
                    yield one

    return tuple(one - 2**64 if one >= 2**63 else one for one in found())


def _attribute(name: str, value: float | tuple[int, ...]) -> bytes:
    """An AttributeProto: a float, one integer, or several."""
    head = field(1, name.encode())
    if isinstance(value, tuple):
        if len(value) == 1:
            return head + field(3, value[0]) + field(20, 2)
        return head + b"".join(field(8, one) for one in value) + field(20, 7)
    return head + bytes([2 << 3 | 5]) + struct.pack("<f", value) + field(20, 1)
