"""What every pass over a denoiser's ONNX graph needs: its types, its layers, its nodes and weights, its opset."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, compose, helper
from onnx.shape_inference import InferenceError, infer_shapes

from sdedit.errors import OptionError
from sdedit.export.to_onnx import bodies, opset_of

OPSETS = range(18, 23)
FLOAT = TensorProto.FLOAT
HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LAYERS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}
SMALL = 64  # elements: longer constants are weights, which inference and conversion need not see

Types = dict[str, int]  # tensor -> TensorProto.DataType


def types_of(model: ModelProto) -> Types:
    """Every tensor's type, by strict inference, which refuses operands that disagree."""
    try:
        graph = infer_shapes(without_weights(model), check_type=True, strict_mode=True).graph
    except InferenceError as error:
        raise OptionError(
            f"the types of the graph do not agree: {error}", hint="onnx.checker names the first node that is wrong"
        ) from error
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {weight.name: weight.data_type for weight in model.graph.initializer}


def network(graph: GraphProto, types: Types) -> set[int]:
    """The nodes that have a layer of the network at or above them, and one at or below; by number.

    A layer belongs to the network if x reaches it. Only float32 tensors count: shapes are no data.
    """

    def floats(names: Iterable[str]) -> set[str]:
        return {name for name in names if types.get(name) == FLOAT}

    layers, after, before = set(), set(), set()
    from_x, from_layers, to_layers = {"x"}, set[str](), set[str]()
    for number, node in enumerate(graph.node):
        sources = floats(node.input)
        if sources & from_x:
            from_x |= floats(node.output)
            if node.op_type in LAYERS:
                layers.add(number)
        if sources & from_layers or number in layers:
            from_layers |= floats(node.output)
            after.add(number)
    for number, node in reversed(list(enumerate(graph.node))):
        if floats(node.output) & to_layers or number in layers:
            to_layers |= floats(node.input)
            before.add(number)
    if not layers:
        raise OptionError("no layer of the graph depends on its input x", hint="an artifact's image input is named x")
    return after & before


def set_opset(model: ModelProto, opset: int) -> ModelProto:
    """The same graph in opset 18 to 22. Raises OptionError outside, and where it has no form in that opset."""
    if opset not in OPSETS:
        raise OptionError(f"opset is {opset}; wanted {OPSETS[0]} to {OPSETS[-1]}", hint=f"--opset {OPSETS[0]}")
    result = copied(model)
    if opset == opset_of(model):
        return result
    try:
        converted = onnx.version_converter.convert_version(without_weights(model), opset)
    except RuntimeError as error:
        reason = str(error).rpartition("failed: ")[2]  # without the converter's own source line
        raise OptionError(
            f"the graph cannot be written in opset {opset}: {reason}", hint=f"--opset {opset_of(model)}"
        ) from error
    keep_weights(result.graph, is_large)
    del result.graph.node[:], result.graph.value_info[:], result.opset_import[:]
    result.graph.node.extend(converted.graph.node)
    result.graph.initializer.extend(converted.graph.initializer)
    result.opset_import.extend(converted.opset_import)
    result.ir_version = max(model.ir_version, helper.find_min_ir_version_for(result.opset_import, ignore_unknown=True))
    types_of(result)  # an older opset may lack a type
    return result


def without_weights(model: ModelProto) -> ModelProto:
    """The model with its large constants as inputs: small enough for tools that end at 2 GiB."""
    bare = ModelProto(
        ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions,
        graph=GraphProto(
            name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output,
            initializer=[w for w in model.graph.initializer if not is_large(w)],
        ),
    )  # fmt: skip
    known = {tensor.name for tensor in bare.graph.input}
    for weight in filter(is_large, model.graph.initializer):
        if weight.name not in known:
            bare.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    return bare


def is_large(weight: TensorProto) -> bool:
    return math.prod(weight.dims) > SMALL and weight.data_type in (FLOAT, *HALVES.values())


def lift_constants(graph: GraphProto) -> None:
    """Float32 Constant nodes become initializers, as weights are."""
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.attribute[0].t.data_type == FLOAT:
            graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            nodes.append(node)
    replace_nodes(graph, nodes)


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """The graph's nodes are these; what was inferred of the old ones goes, and constants that nobody uses."""
    used = names_read(nodes) | {output.name for output in graph.output}
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    keep_weights(graph, lambda weight: weight.name in used)


def keep_weights(graph: GraphProto, wanted: Callable[[TensorProto], bool]) -> None:
    """Only these, in place: to write the list anew would copy gigabytes."""
    for i in reversed(range(len(graph.initializer))):
        if not wanted(graph.initializer[i]):
            del graph.initializer[i]


def names_read(nodes: Iterable[NodeProto]) -> set[str]:
    """What nodes read, those inside of control flow included."""
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
        for body in bodies(node):
            read |= names_read(body.node) | {output.name for output in body.output}
    return read


def rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    """Also inside of control flow, where a name means the same."""
    for node in nodes:
        for tensors in (node.input, node.output):
            for i, name in enumerate(tensors):
                tensors[i] = names.get(name, name)
        for body in bodies(node):
            rename(body.node, names)
            for output in body.output:
                output.name = names.get(output.name, output.name)


def add_prefix(model: ModelProto, prefix: str) -> ModelProto:
    """The model with a prefix before every name, in place. onnx's own forgets weights that control flow reads."""
    weights = [weight.name for weight in model.graph.initializer]
    result = compose.add_prefix(model, prefix, inplace=True)
    rename(result.graph.node, {name: f"{prefix}{name}" for name in weights})
    return result


def copied(model: ModelProto) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    return result
