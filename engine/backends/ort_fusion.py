"""A graph that ONNX Runtime has optimised, with this package's operators (operators/) in the place of its own nodes.

What is looked for is how PyTorch's exporter writes a convolution with what is added to it; a group norm with what
follows: Reshape, InstanceNormalization, Reshape, Mul, Add, a modulation by the noise level's embedding, SiLU; and
attention.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from sdedit.protobuf import Value, field, fields, text, varint

FORMAT = 3  # of what `fuse` writes; another when it writes something else for the same graph
DOMAIN = "sdedit"
NODE, INITIALIZER, OUTPUT = 1, 5, 12  # of a GraphProto
GRAPH, OPSET = 7, 8  # of a ModelProto
GELU, PRODUCTS = "com.microsoft.QuickGelu", ("MatMul", "com.microsoft.FusedMatMul")
OTHER_FLAGS = ("transA", "transBatchA", "transBatchB")  # of a FusedMatMul, beside transB
HALVES = (None, "fp16", "bf16")  # of the attribute `half` of a Conv
FLOAT, INT64 = 1, 7  # of a TensorProto's data_type
ROWS_LAST_BUT_ONE, ROWS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)  # orders of (n, rows, heads, columns)


def fuse(model: bytes, *, half: str | None = None) -> bytes | None:
    """The same network with this package's operators; None where it has no use for them.

    half: "fp16" or "bf16", of its convolutions; None where none is fused.
    Raises ValueError where `model` is no ONNX model, IndexError or StopIteration where it is not a valid one.
    """
    parts = list(fields(memoryview(model)))
    graph = _Graph(next(value for number, value in parts if number == GRAPH), half)
    if any(node.has_graphs for node in graph.nodes):  # whose insides may use what would be taken away
        return None
    for match in (_group_norm, _convolution, _attention):
        for node in list(graph.nodes):
            match(graph, node)
    if not graph.fused or (half and not graph.has_convolution):
        return None
    opset = field(OPSET, field(1, DOMAIN.encode()) + field(2, 1))
    return b"".join(field(n, graph.written() if n == GRAPH else value) for n, value in parts) + opset


class _Node:
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
class _Constant:
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


class _Graph:
    """A GraphProto: its nodes, in their order, and who makes and uses what."""

    def __init__(self, data: Value, half: str | None) -> None:
        self.half, self.has_convolution = half, False
        self.nodes: list[_Node] = []
        self.constants: dict[str, _Constant] = {}
        self.fused: dict[int, bytes] = {}  # id of the last node of a match -> what stands in its place
        self._rest: list[tuple[int, Value]] = []
        self._kept: set[str] = set()
        for number, value in fields(data):
            if number == NODE:
                self.nodes.append(_Node(value))
                continue
            self._rest.append((number, value))
            if number == INITIALIZER:
                parts = list(fields(value))
                name = text(next(v for n, v in parts if n == 8))
                element = next(v for n, v in parts if n == 2 and isinstance(v, int))
                self.constants[name] = _Constant(_integers(parts, 1), element, value)
            elif number == OUTPUT:
                self._kept.add(text(next(v for n, v in fields(value) if n == 1)))
        self._makers = {name: node for node in self.nodes for name in node.outputs}
        self._users: dict[str, list[_Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)

    def maker(self, name: str, *operators: str) -> _Node | None:
        """The node that makes this, if it is one of these."""
        node = self._makers.get(name)
        return node if node is not None and node.operator in operators else None

    def user(self, node: _Node | None, *operators: str) -> _Node | None:
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

    def replace(self, last: _Node, operator: str, inputs: Sequence[str], **attributes: float | tuple[int, ...]) -> None:
        """Have this operator make what `last` makes. What nobody uses then is left out."""
        parts = [field(1, name.encode()) for name in inputs]
        parts += [field(2, last.output.encode()), field(4, operator.encode()), field(7, DOMAIN.encode())]
        parts += [field(5, _attribute(name, value)) for name, value in attributes.items()]
        self.fused[id(last)] = b"".join(parts)

    def written(self) -> bytes:
        written: list[bytes] = []
        used = set(self._kept)
        for node in reversed(self.nodes):
            data = self.fused.get(id(node), node.data)
            if used.isdisjoint(node.outputs):
                continue
            assert not isinstance(data, int)
            used.update(node.inputs if id(node) not in self.fused else _Node(memoryview(data)).inputs)
            written.append(field(NODE, data))
        return b"".join([*reversed(written), *(field(number, value) for number, value in self._rest)])


def _group_norm(graph: _Graph, norm: _Node) -> None:
    """x -> (n, groups, all) -> normalised -> as x -> * scale -> + shift (-> * and + of the modulation) (-> SiLU)"""
    if norm.operator != "InstanceNormalization" or (flat := graph.maker(norm.inputs[0], "Reshape")) is None:
        return
    back = graph.user(norm, "Reshape")
    scaled = graph.user(back, "Mul")
    last = graph.user(scaled, "Add")
    if graph.user(flat, norm.operator) is None or back is None or scaled is None or last is None:
        return
    x = flat.inputs[0]
    shape = graph.maker(back.inputs[1], "Shape")
    groups = len(graph.values(norm.inputs[1]))
    if shape is None or shape.inputs != [x] or shape.integers("start", (0,)) != (0,) or shape.integers("end", ()):
        return
    plain = {*graph.values(norm.inputs[1])} == {1.0} and {*graph.values(norm.inputs[2])} == {0.0}
    if not plain or graph.values(flat.inputs[1]) != (0, groups, -1):
        return
    inputs = [x, _other(scaled, back.output), _other(last, scaled.output)]
    if any(name not in graph.constants or not graph.constants[name].is_of_channels for name in inputs[1:]):
        return
    modulated = graph.user(last, "Mul")
    moved = graph.user(modulated, "Add")
    if modulated is not None and moved is not None:
        then = [_other(modulated, last.output), _other(moved, modulated.output)]
        if all(_is_of_channels(graph, name) for name in then):
            inputs, last = inputs + then, moved
    activated = graph.user(last, GELU)
    if activated is not None and activated.number("alpha", 1.702) == 1.0:
        last = activated
    told = {"groups": (groups,), "silu": (int(last is activated),)}
    graph.replace(last, "GroupNorm", inputs, epsilon=norm.number("epsilon", 1e-5), **told)


def _convolution(graph: _Graph, conv: _Node) -> None:
    """Conv (-> +), of two dimensions and all channels."""
    if conv.operator != "Conv":
        return
    weights = graph.constants.get(conv.inputs[1])
    if weights is None or weights.element != FLOAT or len(weights.dims) != 4:
        return
    if conv.integers("group", (1,)) != (1,) or {*conv.integers("dilations", (1, 1))} != {1}:
        return
    pads, strides = conv.integers("pads", (0, 0, 0, 0)), conv.integers("strides", (1, 1))
    if conv.text("auto_pad", "NOTSET") != "NOTSET" or min(pads) < 0:
        return
    inputs, last = list(conv.inputs), conv
    if (added := graph.user(conv, "Add")) is not None and (other := _other(added, conv.output)) not in graph.constants:
        inputs, last = [*inputs, *[""] * (3 - len(inputs)), other], added
    graph.has_convolution = True
    graph.replace(last, "Conv", inputs, pads=pads, strides=strides, half=(HALVES.index(graph.half),))


def _attention(graph: _Graph, softmax: _Node) -> None:
    """Product -> Softmax -> product, as scaled dot-product attention has them.

    With the transpositions around it that bring (n, rows, heads, columns) to (n, heads, rows, columns) and back, and
    the numbers by which q and k are multiplied.
    """
    if softmax.operator != "Softmax" or softmax.integers("axis", (-1,)) != (-1,):
        return
    scores = graph.maker(softmax.inputs[0], *PRODUCTS)
    result = graph.user(softmax, *PRODUCTS)
    if scores is None or result is None or graph.user(scores, softmax.operator) is None:
        return
    others = [product.integers(flag, (0,)) for product in (scores, result) for flag in OTHER_FLAGS]
    if result.inputs[0] != softmax.output or set(others) != {(0,)} or result.number("alpha", 1.0) != 1.0:
        return
    keys_are_rows, values_are_columns = (product.integers("transB", (0,)) == (1,) for product in (scores, result))
    scale, inputs = scores.number("alpha", 1.0), [*scores.inputs, result.inputs[1]]
    rows_last = False, not keys_are_rows, values_are_columns
    factors = ["", ""]
    inner = []
    for number, (name, last_one) in enumerate(zip(inputs, rows_last, strict=True)):
        if number < 2 and (factor := graph.maker(name, "Mul")) is not None:
            number_of = next((one for one in factor.inputs if _is_one_number(graph, one)), None)
            if number_of is not None:
                factors[number], name = number_of, _other(factor, number_of)
        outer = graph.maker(name, "Transpose")
        if outer is not None and outer.integers("perm", ()) == (ROWS_LAST if last_one else ROWS_LAST_BUT_ONE):
            inner.append(outer.inputs[0])
    last = graph.user(result, "Transpose")
    inside = len(inner) == 3 and last is not None and last.integers("perm", ()) == ROWS_LAST_BUT_ONE
    if inside:
        assert last is not None
        result, inputs = last, [*inner, *factors]
    told = {
        "keys_are_rows": (int(keys_are_rows or inside),),
        "values_are_rows": (int(inside or not values_are_columns),),
        "heads_inside": (int(inside),),
    }
    graph.replace(result, "Attention", inputs, scale=scale, **told)


def _is_one_number(graph: _Graph, name: str) -> bool:
    """Whether this is one number for sure: a constant, the last part of a shape, or made of such."""
    if name in graph.constants:
        return len(graph.values(name)) == 1
    if (node := graph.maker(name, "Slice")) is not None:
        return graph.values(node.inputs[1]) == (-1,) and graph.maker(node.inputs[0], "Shape", "Gather") is not None
    node = graph.maker(name, "Sqrt", "Div", "Mul", "Cast")
    return node is not None and all(_is_one_number(graph, one) for one in node.inputs)


def _is_of_channels(graph: _Graph, name: str) -> bool:
    """Whether this is (n, c, 1, 1): made of a linear layer's output, perhaps a part of it, perhaps plus one number."""
    while (node := graph.maker(name, "Slice", "Add", "Unsqueeze")) is not None:
        if node.operator == "Unsqueeze":
            inner = graph.maker(node.inputs[0], "Unsqueeze")
            ends = graph.values(node.inputs[1]) in ((3,), (-1,))
            return (
                ends
                and inner is not None
                and graph.values(inner.inputs[1]) in ((2,), (-1,))
                and graph.maker(inner.inputs[0], "Gemm") is not None
            )
        if node.operator == "Slice" and [graph.values(name) for name in node.inputs[3:4]] != [(1,)]:
            return False
        if node.operator == "Add" and len(graph.values(node.inputs[1])) != 1:
            return False
        name = node.inputs[0]
    return False


def _other(node: _Node, name: str) -> str:
    """The input of a sum or product that is not this one."""
    first, second = node.inputs
    return second if first == name else first


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
