"""A graph that ONNX Runtime has optimised, with this package's operators (operators/) in the place of its own nodes.

What is looked for is how PyTorch's exporter writes a convolution with what is added to it; a group norm with what
follows: Reshape, InstanceNormalization, Reshape, Mul, Add, a modulation by the noise level's embedding, SiLU; and
attention, with the linear layers around it where each pixel of a picture is a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdedit.backends.ort_nodes import DOMAIN, FLOAT, Graph, Node
from sdedit.protobuf import field, fields

FORMAT = 3  # of what `fuse` writes; another when it writes something else for the same graph
GRAPH, OPSET = 7, 8  # of a ModelProto
GELU, PRODUCTS = "com.microsoft.QuickGelu", ("MatMul", "com.microsoft.FusedMatMul")
OTHER_FLAGS = ("transA", "transBatchA", "transBatchB")  # of a FusedMatMul, beside transB
ROWS_FIRST = 0, 2, 1  # an order of (n, channels, rows)
NO_PADS, NO_STRIDES = (0, 0, 0, 0), (1, 1)
ROWS_LAST_BUT_ONE, ROWS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)  # orders of (n, rows, heads, columns)


def fuse(model: bytes, *, half: str | None = None) -> bytes | None:
    """The same network with this package's operators; None where it has no use for them.

    half: "fp16" or "bf16", of its convolutions; None where none is fused.
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
    inputs, last = list(conv.inputs), conv
    if (added := graph.user(conv, "Add")) is not None and (other := _other(added, conv.output)) not in graph.constants:
        inputs, last = [*inputs, *[""] * (3 - len(inputs)), other], added
    graph.convolve(last, inputs, pads, strides)


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
            number_of = next((one for one in factor.inputs if _one_number(graph, one) is not None), None)
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


def _attention_of_pixels(
    graph: Graph, attended: Node, q_k_v: Sequence[str], scale: float, factors: Sequence[str]
) -> bool:
    """Group norm of a picture -> linear layers -> attention between pixels -> linear layer -> + the picture.

    Whether it is that. PyTorch makes rows of the pixels for it; here they stay where they are, the layers are
    convolutions of 1x1, and nothing is transposed. attended: the last node of the attention; q_k_v: its inputs.
    """
    layers = [_layer_of_rows(graph, name) for name in q_k_v]
    out = graph.user(graph.user(attended, "Reshape"), "MatMul")
    moved = graph.user(out, "Add")
    picture = graph.user(graph.user(moved, "Transpose"), "Reshape")
    if None in layers or out is None or moved is None or picture is None:
        return False
    first, *others = [layer for layer in layers if layer is not None]
    norm = graph.fused.get(id(graph.maker(first.x, "Add")))
    if norm is None or norm.name != "GroupNorm" or any((one.x, one.heads) != (first.x, first.heads) for one in others):
        return False
    flat = graph.maker(norm.inputs[0], "Reshape")
    back = graph.maker(picture.inputs[1], "Concat")
    if flat is None or graph.values(flat.inputs[1]) != (0, 0, -1) or back is None or len(back.inputs) != 4:
        return False
    if graph.users(first.x) - {*PRODUCTS, "Transpose"} or not _is_linear(graph, out, moved):
        return False
    columns = graph.constants[first.weights].dims[1] // first.heads
    for factor in filter(None, factors):
        scale *= _one_number(graph, factor, columns) or 0
    x = flat.inputs[0]
    norm.inputs = [x, *norm.inputs[1:]]
    for layer in (first, *others):
        graph.convolve(layer.last, [first.x, layer.weights, layer.bias], NO_PADS, NO_STRIDES)
    told = {"keys_are_rows": (1,), "values_are_rows": (1,), "heads_inside": (0,), "heads": (first.heads,)}
    graph.replace(attended, "Attention", [layer.last.output for layer in (first, *others)], scale=scale, **told)
    inputs, last = [attended.output, out.inputs[1], _other(moved, out.output)], picture
    if (added := graph.user(picture, "Add")) is not None and (
        other := _other(added, picture.output)
    ) not in graph.constants:
        inputs, last = [*inputs, other], added
    graph.convolve(last, inputs, NO_PADS, NO_STRIDES)
    return True


@dataclass
class _Layer:
    """A linear layer of rows, each of which is then divided into heads."""

    x: str  # (n, channels, rows)
    weights: str
    bias: str
    heads: int
    last: Node  # that makes the rows


def _layer_of_rows(graph: Graph, name: str) -> _Layer | None:
    """The layer whose rows (n, rows, heads, columns) are."""
    divided = graph.maker(name, "Reshape")
    last = divided and graph.maker(divided.inputs[0], "Add")
    if divided is None or last is None or graph.users(last.output) - {"Reshape", "Shape"}:
        return None
    product = next((one for name in last.inputs if (one := graph.maker(name, *PRODUCTS)) is not None), None)
    sizes = graph.maker(divided.inputs[1], "Concat")
    heads = graph.values(sizes.inputs[2]) if sizes is not None and len(sizes.inputs) == 4 else ()
    if product is None or len(heads) != 1 or not heads[0] >= 1 or not _is_linear(graph, product, last):
        return None
    x: str | None = product.inputs[0]
    if product.integers("transA", (0,)) == (0,):
        turned = graph.maker(product.inputs[0], "Transpose")
        x = turned.inputs[0] if turned is not None and turned.integers("perm", ()) == ROWS_FIRST else None
    if x is None or graph.constants[product.inputs[1]].dims[1] % heads[0]:
        return None
    return _Layer(x, product.inputs[1], _other(last, product.output), int(heads[0]), last)


def _is_linear(graph: Graph, product: Node, added: Node) -> bool:
    """Whether a product, perhaps of what is transposed, and a sum are a linear layer with constant weights and bias."""
    weights, bias = (graph.constants.get(name) for name in (product.inputs[1], _other(added, product.output)))
    if weights is None or weights.element != FLOAT or len(weights.dims) != 2:
        return False
    others = {product.integers(flag, (0,)) for flag in ("transB", "transBatchA", "transBatchB")}
    if bias is None or bias.element != FLOAT or bias.dims != weights.dims[1:]:
        return False
    return others == {(0,)} and product.number("alpha", 1.0) == 1.0


def _one_number(graph: Graph, name: str, last: float = 1.0) -> float | None:
    """Its value, where this is one number for sure: a constant, the last part of a shape, or made of such."""
    if name in graph.constants:
        values = graph.values(name)
        return values[0] if len(values) == 1 else None
    if (node := graph.maker(name, "Slice")) is not None:
        is_last = graph.values(node.inputs[1]) == (-1,) and graph.maker(node.inputs[0], "Shape", "Gather") is not None
        return last if is_last else None
    if (node := graph.maker(name, "Sqrt", "Div", "Mul", "Cast")) is None:
        return None
    values = tuple(value for one in node.inputs if (value := _one_number(graph, one, last)) is not None)
    match node.operator, values:
        case "Sqrt", (value,) if value >= 0:
            return math.sqrt(value)
        case "Div", (a, b) if b != 0:
            return a / b
        case "Mul", (a, b):
            return a * b
        case "Cast", (value,):
            return value
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
