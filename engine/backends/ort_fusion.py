"""A graph that ONNX Runtime has optimised, with this package's operators (operators/) in the place of its own nodes.

What is looked for is how PyTorch's exporter writes a convolution with what is added to it; a group norm with what
follows: Reshape, InstanceNormalization, Reshape, Mul, Add, a modulation by the noise level's embedding, SiLU; and
attention, with the linear layers around it where each pixel of a picture is a row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdedit.backends.ort_nodes import DOMAIN, FLOAT, Graph, Node
from sdedit.protobuf import field, fields

FORMAT = 4  # of what `fuse` writes; another when it writes something else for the same graph
GRAPH, OPSET = 7, 8  # of a ModelProto
GELU, PRODUCTS = "com.microsoft.QuickGelu", ("MatMul", "com.microsoft.FusedMatMul")
OTHER_FLAGS = ("transA", "transBatchA", "transBatchB")  # of a FusedMatMul, beside transB
ROWS_FIRST = 0, 2, 1  # an order of (n, channels, rows)
NO_PADS, NO_STRIDES = (0, 0, 0, 0), (1, 1)
ROWS_LAST_BUT_ONE, ROWS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)  # orders of (n, rows, heads, columns)


def fuse(model: bytes, *, half: str | None = None) -> bytes | None:
    """The same network with this package's operators; None where it has no use for them.

    half: "fp16" or "bf16", of its convolutions; there is no use where it has none of them.
    Raises ValueError where `model` is no ONNX model, IndexError or StopIteration where it is not a valid one.
    """
    parts = list(fields(memoryview(model)))
    graph = Graph(next(value for number, value in parts if number == GRAPH), half)
    if any(node.has_graphs for node in graph.nodes):  # whose insides may use what would be taken away
        return None
    for match in (_group_norm, _convolution, _attention):  # the last one looks for norms
        for node in list(graph.nodes):
            match(graph, node)
    if not graph.fused or (half and not graph.has_convolution):
        return None
    opset = field(OPSET, field(1, DOMAIN.encode()) + field(2, 1))
    return b"".join(field(n, graph.written() if n == GRAPH else value) for n, value in parts) + opset


def _group_norm(graph: Graph, norm: Node) -> None:
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


def _convolution(graph: Graph, conv: Node) -> None:
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
    inputs, last = _with_added(graph, conv, conv.inputs)
    graph.convolve(last, inputs, pads, strides)


def _with_added(graph: Graph, last: Node, inputs: Sequence[str]) -> tuple[list[str], Node]:
    """The inputs of a convolution that makes what `last` makes, with what is added to that; and the last node then."""
    if (added := graph.user(last, "Add")) is not None and (other := _other(added, last.output)) not in graph.constants:
        return [*inputs, *[""] * (3 - len(inputs)), other], added
    return list(inputs), last


def _attention(graph: Graph, softmax: Node) -> None:
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
    factors = ["", ""]  # of q and k
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
        if _attention_of_pixels(graph, last, inner, scale, factors):
            return
        result, inputs = last, [*inner, *factors]
    told = {
        "keys_are_rows": (int(keys_are_rows or inside),),
        "values_are_rows": (int(inside or not values_are_columns),),
        "heads_inside": (int(inside),),
        "heads": (0,),
    }
    graph.replace(result, "Attention", inputs, scale=scale, **told)


@dataclass
class _Layer:
    """A linear layer of rows, each of which is then divided into heads."""

    x: str  # (n, channels, rows)
    weights: str
    bias: str
    last: Node  # that makes (n, rows, heads · columns)
    divided: Node  # that makes (n, rows, heads, columns)
    heads: int


def _attention_of_pixels(
    graph: Graph, attended: Node, q_k_v: Sequence[str], scale: float, factors: Sequence[str]
) -> bool:
    """Group norm -> linear layers -> attention between pixels -> linear layer (-> +). Whether it is that.

    PyTorch makes rows of the pixels for it. Here they stay where they are: the layers are convolutions of 1x1, and
    nothing is transposed. attended: the last node of the attention; q_k_v: its inputs; factors: of q and of k.
    """
    found = [_layer_of_rows(graph, name) for name in q_k_v]
    layers = [layer for layer in found if layer is not None]
    product = graph.user(graph.user(attended, "Reshape"), "MatMul")
    moved = graph.user(product, "Add")
    turned = graph.user(moved, "Transpose")
    picture = graph.user(turned, "Reshape")
    if len(layers) < 3 or product is None or moved is None or turned is None or picture is None:
        return False
    (q, k, v), x = layers, layers[0].x
    norm = graph.fused.get(id(graph.maker(x, "Add")))
    if norm is None or norm.name != "GroupNorm" or len(norm.inputs) != 3 or turned.integers("perm", ()) != ROWS_FIRST:
        return False
    flat = graph.maker(norm.inputs[0], "Reshape")
    if flat is None or graph.values(flat.inputs[1]) != (0, 0, -1) or not _has_sides_of(graph, picture, flat.inputs[0]):
        return False
    if any((layer.x, layer.heads) != (x, q.heads) for layer in layers) or not _is_linear(graph, product, moved):
        return False
    columns = graph.constants[q.weights].dims[1] // q.heads
    known = {layer.divided.output: columns for layer in (q, k)}
    numbers = [_value(graph, name, known) for name in factors if name]
    if None in numbers or graph.constants[product.inputs[1]].dims[0] != graph.constants[v.weights].dims[1]:
        return False
    before, norm_inputs = dict(graph.fused), norm.inputs
    norm.inputs = [flat.inputs[0], *norm.inputs[1:]]
    for layer in layers:
        graph.convolve(layer.last, [x, layer.weights, layer.bias], NO_PADS, NO_STRIDES)
    told = {"keys_are_rows": (1,), "values_are_rows": (1,), "heads_inside": (0,), "heads": (q.heads,)}
    scale *= math.prod(number for number in numbers if number is not None)
    graph.replace(attended, "Attention", [layer.last.output for layer in layers], scale=scale, **told)
    inputs, last = _with_added(graph, picture, [attended.output, product.inputs[1], _other(moved, product.output)])
    graph.convolve(last, inputs, NO_PADS, NO_STRIDES)
    ours = {id(node) for node in (*(layer.last for layer in layers), attended, last)}
    changed = {x, attended.output, *(layer.last.output for layer in layers)}  # pixels now, where rows were
    if any(id(node) not in ours and not changed.isdisjoint(one.inputs) for node, one in graph.live()):
        graph.fused, norm.inputs = before, norm_inputs
        return False
    return True


def _layer_of_rows(graph: Graph, name: str) -> _Layer | None:
    """The one that makes the rows that are divided in `name`, if that is what it is."""
    divided = graph.maker(name, "Reshape")
    last = divided and graph.maker(divided.inputs[0], "Add")
    sizes = divided and graph.maker(divided.inputs[1], "Concat")  # n, rows, heads, columns
    if divided is None or last is None or sizes is None or len(sizes.inputs) != 4:
        return None
    product = next((one for name in last.inputs if (one := graph.maker(name, *PRODUCTS)) is not None), None)
    heads = graph.values(sizes.inputs[2])
    if product is None or len(heads) != 1 or not heads[0] >= 1 or not _is_linear(graph, product, last):
        return None
    if graph.constants[product.inputs[1]].dims[1] % heads[0] or not _is_of_columns(graph, sizes.inputs[3], heads):
        return None
    x = product.inputs[0]  # transposed, here or there
    if product.integers("transA", (0,)) == (0,):
        turned = graph.maker(x, "Transpose")
        if turned is None or turned.integers("perm", ()) != ROWS_FIRST:
            return None
        x = turned.inputs[0]
    return _Layer(x, product.inputs[1], _other(last, product.output), last, divided, int(heads[0]))


def _is_linear(graph: Graph, product: Node, added: Node) -> bool:
    """Whether a product, perhaps of what it transposes, and a sum are a linear layer: constant weights and bias."""
    weights, bias = (graph.constants.get(name) for name in (product.inputs[1], _other(added, product.output)))
    if weights is None or weights.element != FLOAT or len(weights.dims) != 2:
        return False
    others = {product.integers(flag, (0,)) for flag in ("transB", "transBatchA", "transBatchB")}
    if bias is None or bias.element != FLOAT or bias.dims != weights.dims[1:]:
        return False
    return others == {(0,)} and product.number("alpha", 1.0) == 1.0


def _is_of_columns(graph: Graph, name: str, heads: tuple[float, ...]) -> bool:
    """Whether this is a constant, or the last one of three sizes, divided by the heads."""
    if (node := graph.maker(name, "Unsqueeze")) is not None:
        name = node.inputs[0]
    if (node := graph.maker(name, "Div")) is not None and graph.values(node.inputs[1]) == heads:
        size = graph.maker(node.inputs[0], "Gather")
        return (
            size is not None
            and graph.maker(size.inputs[0], "Shape") is not None
            and (graph.values(size.inputs[1]) in ((2,), (-1,)))
        )
    return name in graph.constants


def _has_sides_of(graph: Graph, reshape: Node, x: str) -> bool:
    """Whether it makes (n, channels, height, width), the last two those of x or constants."""
    sizes = graph.maker(reshape.inputs[1], "Concat")
    if sizes is None or len(sizes.inputs) != 4:
        return False
    for axis, name in enumerate(sizes.inputs[2:], start=2):
        while (node := graph.maker(name, "Unsqueeze")) is not None:
            name = node.inputs[0]
        size = graph.maker(name, "Gather")
        shape = size and graph.maker(size.inputs[0], "Shape")
        of_x = (
            size is not None and shape is not None and shape.inputs == [x] and graph.values(size.inputs[1]) == (axis,)
        )
        if not of_x and name not in graph.constants:
            return False
    return True


def _is_one_number(graph: Graph, name: str) -> bool:
    """Whether this is one number for sure: a constant, the last part of a shape, or made of such."""
    if name in graph.constants:
        return len(graph.values(name)) == 1
    if (node := graph.maker(name, "Slice")) is not None:
        return graph.values(node.inputs[1]) == (-1,) and graph.maker(node.inputs[0], "Shape", "Gather") is not None
    node = graph.maker(name, "Sqrt", "Div", "Mul", "Cast")
    return node is not None and all(_is_one_number(graph, one) for one in node.inputs)


def _value(graph: Graph, name: str, columns: Mapping[str, int]) -> float | None:
    """What `_is_one_number`, where that is known. columns: the last size of tensors of four dimensions."""
    if name in graph.constants:
        (value,) = graph.values(name)
        return value
    if (node := graph.maker(name, "Slice")) is not None:
        ordered = graph.maker(node.inputs[0], "Gather")  # of a transposed tensor, as the optimiser writes it
        if ordered is not None and graph.values(ordered.inputs[1])[3:] != (3,):
            return None
        shape = graph.maker(node.inputs[0] if ordered is None else ordered.inputs[0], "Shape")
        is_whole = shape is not None and shape.integers("start", (0,)) == (0,) and not shape.integers("end", ())
        return columns.get(shape.inputs[0]) if shape is not None and is_whole else None
    node = graph.maker(name, "Sqrt", "Div", "Mul", "Cast")
    values = [None if node is None else _value(graph, one, columns) for one in (node.inputs if node else [name])]
    match node and node.operator, values:
        case "Sqrt", [float(value)] if value >= 0:
            return math.sqrt(value)
        case "Div", [float(a), float(b)] if b != 0:  # of integers it would be another
            return a / b
        case "Mul", [float(a), float(b)]:
            return a * b
        case "Cast", [int() | float() as value] if node is not None and node.integers("to", ()) == (FLOAT,):
            return float(value)
    return None


def _is_of_channels(graph: Graph, name: str) -> bool:
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


def _other(node: Node, name: str) -> str:
    """The input of a sum or product that is not this one."""
    first, second = node.inputs
    return second if first == name else first
