"""A denoiser's graph in reduced precision, written into its types; the interface stays float32.

`halve` gives a strongly typed graph, which is all that TensorRT 11 goes by. Half precision begins at the first layer
that sees x and ends after the last. In between, what sums or exponentiates stays float32 (normalisation, softmax),
and so does what follows it element by element up to the next layer: one rounding on the way in, one on the way out,
and a compiler fuses all of it into one kernel. What depends on σ or a class label alone stays float32 too.

No function here changes its argument, nor the metadata.
"""

import math
from collections import Counter

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sdedit.errors import OptionError
from sdedit.export.graph import (
    FLOAT,
    HALVES,
    LAYERS,
    copied,
    lift_constants,
    network,
    rename,
    replace_nodes,
    set_opset,
    types_of,
)  # fmt: skip
from sdedit.export.to_onnx import opset_of

FIRST_BF16_CONV = 22  # the opset whose Conv takes bfloat16
NOT_BF16 = {"ConvTranspose"}  # TensorRT-RTX 1.7 builds none
MOVES = {  # and what else is as exact, or as harmless, in half precision
    *("AveragePool", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"),
    *("Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
ELEMENTWISE = {"Add", "Clip", "Div", "LeakyRelu", "Mul", "Neg", "Relu", "Reshape", "Sigmoid", "Sub"}


def halve(model: ModelProto, precision: str) -> ModelProto:
    """The denoiser with its network in "fp16", or in "bf16", which raises the opset to 22.

    Raises OptionError for a weight beyond float16's range, and for a graph whose types disagree.
    """
    half = HALVES[precision]
    model = widen(model)
    _refuse_branches(model.graph)
    if half == TensorProto.BFLOAT16 and opset_of(model) < FIRST_BF16_CONV:
        model = set_opset(model, FIRST_BF16_CONV)
    graph = model.graph
    lift_constants(graph)
    _scale_before_products(graph)
    types = types_of(model)
    inside = network(graph, types)
    weights = {w.name: w for w in graph.initializer if w.data_type == FLOAT}
    halves: set[str] = set()  # the tensors in half precision
    twins: dict[str, str] = {}  # tensor -> the same in the other precision
    nodes: list[NodeProto] = []

    def operand(name: str, wanted: int) -> str:
        """The tensor in the wanted precision: itself or its twin, made where it is needed first."""
        if (name in halves) == (wanted == half):
            return name
        if name not in twins:
            twins[name] = f"{name}.{'half' if wanted == half else 'float'}"
            if name in weights:
                graph.initializer.append(_rounded(weights[name], half, twins[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [twins[name]], twins[name], to=wanted))
        return twins[name]

    for number, node in enumerate(graph.node):
        typed = _typed_like_result(node, model, half) if number in inside else set()
        if node.op_type in ELEMENTWISE and not any(node.input[i] in halves for i in typed):
            typed = set()  # all its operands are float32: so is it
        if typed:
            halves.update(name for name in node.output if types.get(name) == FLOAT)
        for i, name in enumerate(node.input):
            if types.get(name) == FLOAT:
                node.input[i] = operand(name, half if i in typed else FLOAT)
        nodes.append(node)
    for name in {output.name for output in graph.output} & halves:  # the last layer gives the output itself
        rename(nodes, {operand(name, FLOAT): name, name: f"{name}.half"})
    replace_nodes(graph, nodes)
    left = {weight.name for weight in graph.initializer}
    own_names = {twin: name for name, twin in twins.items() if name in weights and name not in left}
    rename(graph.node, own_names)
    for weight in graph.initializer:
        weight.name = own_names.get(weight.name, weight.name)
    types_of(model)  # that operands agree everywhere
    return model


def widen(model: ModelProto) -> ModelProto:
    """The same graph in float32 throughout: whatever was stored or computed in half precision is float32."""
    model = copied(model)
    graph = model.graph
    for tensor in (*graph.input, *graph.output):
        if tensor.type.tensor_type.elem_type in HALVES.values():
            tensor.type.tensor_type.elem_type = FLOAT
    _widen_weights(graph)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in HALVES.values():
                attribute.i = FLOAT
    types = types_of(model)
    weights, outputs = {w.name for w in graph.initializer}, {output.name for output in graph.output}
    aliases: dict[str, str] = {}  # of casts that change nothing any more, and of weights that an Identity shares

    def resolve(name: str) -> str:
        while name in aliases:
            name = aliases[name]
        return name

    nodes = []
    for node in graph.node:
        cast = node.op_type == "Cast" and types[node.input[0]] == types[node.output[0]]
        if cast or (node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in outputs):
            source, result = resolve(node.input[0]), node.output[0]
            keep_result = result in outputs or (cast and source in weights)
            aliases |= {source: result} if keep_result else {result: source}
        else:
            nodes.append(node)
    names = {name: resolve(name) for name in aliases}
    rename(nodes, names)
    for weight in graph.initializer:
        weight.name = names.get(weight.name, weight.name)
    replace_nodes(graph, nodes)
    return model


def emulate(model: ModelProto) -> ModelProto:
    """A float32 graph with the values of a half-precision one: each result is rounded where the types say so.

    For runtimes without bfloat16 convolutions. Layers accumulate in float32, as tensor cores do.
    """
    types = types_of(model)
    model = copied(model)
    _widen_weights(model.graph)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if (half := types.get(name)) in HALVES.values() and node.op_type != "Constant":
                exact, rounded = f"{name}.exact", f"{name}.rounded"
                node.output[i] = rounded if node.op_type == "Cast" else exact
                if node.op_type != "Cast":
                    nodes.append(helper.make_node("Cast", [exact], [rounded], to=half))
                nodes.append(helper.make_node("Cast", [rounded], [name], to=FLOAT))
    replace_nodes(model.graph, nodes)
    return model


def _typed_like_result(node: NodeProto, model: ModelProto, half: int) -> set[int]:
    """The inputs that go to half precision with the result (Resize's scales do not); none if the node must not."""
    known = LAYERS | MOVES | ELEMENTWISE
    if half == TensorProto.BFLOAT16:
        known -= NOT_BF16
    if node.domain not in ("", "ai.onnx") or node.op_type not in known:
        return set()
    schema = onnx.defs.get_schema(node.op_type, opset_of(model))
    kind = schema.outputs[0].type_str
    allowed = next(c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == kind)
    if f"tensor({TensorProto.DataType.Name(half).lower()})" not in allowed:
        return set()
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in range(len(node.input))]
    return {i for i, type_str in enumerate(formal) if type_str == kind}


def _refuse_branches(graph: GraphProto) -> None:
    for node in graph.node:
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise OptionError(
                f"{node.op_type} {node.name} holds a graph of its own, and only plain ones can be reduced",
                hint="--precision fp32, or export the model with fixed sizes",
            )


def _scale_before_products(graph: GraphProto) -> None:
    """softmax(c·(q k)) becomes softmax((c·q) k), for a scalar constant c: unscaled scores can leave float16's range."""
    scalars = {w.name for w in graph.initializer if math.prod(w.dims) == 1 and w.data_type == FLOAT}
    users = Counter(name for node in graph.node for name in node.input)
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    scores = {node.input[0] for node in graph.node if node.op_type == "Softmax"}
    for scale in (node for node in graph.node if node.output[0] in scores):
        if scale.op_type == "Mul" and scale.input[0] in scalars:
            scale.input[:] = reversed(scale.input)
        if scale.op_type not in ("Mul", "Div") or scale.input[1] not in scalars:
            continue
        product = products.get(scale.input[0])
        if product is None or users[product.output[0]] > 1:
            continue
        (q, k), (qk, c) = product.input, scale.input
        product.op_type, scale.op_type = scale.op_type, product.op_type
        product.input[:], scale.input[:] = [q, c], [qk, k]


def _rounded(weight: TensorProto, half: int, name: str) -> TensorProto:
    values = numpy_helper.to_array(weight)
    with np.errstate(over="ignore"):
        rounded = values.astype(helper.tensor_dtype_to_np_dtype(half))  # to nearest, ties to even
    if (np.isfinite(values) & ~np.isfinite(rounded)).any():
        raise OptionError(
            f"{weight.name} has values up to {np.abs(values[np.isfinite(values)]).max():.4g}; float16 ends at 65504",
            hint="--precision bf16, which has float32's range",
        )
    return numpy_helper.from_array(rounded, name)


def _widen_weights(graph: GraphProto) -> None:
    attributes = (a for node in graph.node for a in node.attribute if a.type == AttributeProto.TENSOR)
    for tensor in (*graph.initializer, *(attribute.t for attribute in attributes)):
        if tensor.data_type in HALVES.values():
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
