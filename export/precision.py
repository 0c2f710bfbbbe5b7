"""A denoiser's graph in reduced precision, written into its types; the interface stays float32.

`halve` gives a strongly typed graph, which is all that TensorRT 11 goes by. Half precision begins at the first layer
that sees x and ends after the last. In between, what sums or exponentiates stays float32 (normalisation, softmax),
and so does what follows it element by element up to the next layer: one rounding on the way in, one on the way out,
and a compiler fuses all of it into one kernel. What depends on σ or a class label alone stays float32 too.

No function here changes its argument, nor the metadata.
"""

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import InferenceError, infer_shapes

from sdedit.errors import OptionError

HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT = TensorProto.FLOAT
OPSETS = range(18, 23)
FIRST_BF16_CONV = 22  # the opset whose Conv takes bfloat16
NOT_BF16 = {"ConvTranspose"}  # TensorRT-RTX 1.7 builds none
LAYERS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}
MOVES = {  # and what else is as exact, or as harmless, in half precision
    *("AveragePool", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"),
    *("Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
ELEMENTWISE = {"Add", "Clip", "Div", "LeakyRelu", "Mul", "Neg", "Relu", "Reshape", "Sigmoid", "Sub"}
ROUNDING = {"DequantizeLinear", "QuantizeLinear"}
SMALL = 64  # elements: longer constants are weights, which inference and conversion need not see
TOLERANCE = 0.03  # of an int8 denoiser, as ‖ΔD‖ / max(‖D‖, ‖x - D‖)
PROBED = 3  # calibration images on which layers are compared
DECISIVE = 0.5  # the σ where they are: as large as the picture's contrast, an error of the network shows most

Types = dict[str, int]  # tensor -> TensorProto.DataType
Feed = Mapping[str, NDArray[np.generic]]


def halve(model: ModelProto, precision: str) -> ModelProto:
    """The denoiser with its network in "fp16", or in "bf16", which raises the opset to 22.

    Raises OptionError for a weight beyond float16's range, and for a graph whose types disagree.
    """
    if precision not in HALVES:
        raise OptionError(f"unknown precision {precision!r}", hint=f"choose one of {', '.join(HALVES)}")
    half = HALVES[precision]
    model = widen(model)
    _refuse_branches(model.graph)
    if half == TensorProto.BFLOAT16 and _opset(model) < FIRST_BF16_CONV:
        model = set_opset(model, FIRST_BF16_CONV)
    graph = model.graph
    _lift_constants(graph)
    _scale_before_products(graph)
    types = _types(model)
    network = _network(graph, types)
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
        typed = _typed_like_result(node, model, half) if number in network else set()
        if node.op_type in ELEMENTWISE and not any(node.input[i] in halves for i in typed):
            typed = set()  # all its operands are float32: so is it
        if typed:
            halves.update(name for name in node.output if types.get(name) == FLOAT)
        for i, name in enumerate(node.input):
            if types.get(name) == FLOAT:
                node.input[i] = operand(name, half if i in typed else FLOAT)
        nodes.append(node)
    for name in {output.name for output in graph.output} & halves:  # the last layer gives the output itself
        _rename(nodes, {operand(name, FLOAT): name, name: f"{name}.half"})
    _replace(graph, nodes)
    left = {weight.name for weight in graph.initializer}
    own_names = {twin: name for name, twin in twins.items() if name in weights and name not in left}
    _rename(graph.node, own_names)
    for weight in graph.initializer:
        weight.name = own_names.get(weight.name, weight.name)
    _types(model)  # that operands agree everywhere
    return model


def widen(model: ModelProto) -> ModelProto:
    """The same graph in float32 throughout: whatever was stored or computed in half precision is float32."""
    model = _copy(model)
    graph = model.graph
    for tensor in (*graph.input, *graph.output):
        if tensor.type.tensor_type.elem_type in HALVES.values():
            tensor.type.tensor_type.elem_type = FLOAT
    _widen_weights(graph)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in HALVES.values():
                attribute.i = FLOAT
    types = _types(model)
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
    _rename(nodes, names)
    for weight in graph.initializer:
        weight.name = names.get(weight.name, weight.name)
    _replace(graph, nodes)
    return model


def emulate(model: ModelProto) -> ModelProto:
    """A float32 graph with the values of a half-precision one: each result is rounded where the types say so.

    For runtimes without bfloat16 convolutions. Layers accumulate in float32, as tensor cores do.
    """
    types = _types(model)
    model = _copy(model)
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
    _replace(model.graph, nodes)
    return model


def set_opset(model: ModelProto, opset: int) -> ModelProto:
    """The same graph in opset 18 to 22. Raises OptionError outside, and where it has no form in that opset."""
    if opset not in OPSETS:
        raise OptionError(f"opset is {opset}; wanted {OPSETS[0]} to {OPSETS[-1]}", hint=f"--opset {OPSETS[0]}")
    result = _copy(model)
    if opset == _opset(model):
        return result
    try:
        converted = onnx.version_converter.convert_version(_without_weights(model), opset)
    except RuntimeError as error:
        reason = str(error).rpartition("failed: ")[2]  # without the converter's own source line
        raise OptionError(
            f"the graph cannot be written in opset {opset}: {reason}", hint=f"--opset {_opset(model)}"
        ) from error
    _keep_weights(result.graph, _is_large)
    del result.graph.node[:], result.graph.value_info[:], result.opset_import[:]
    result.graph.node.extend(converted.graph.node)
    result.graph.initializer.extend(converted.graph.initializer)
    result.opset_import.extend(converted.opset_import)
    result.ir_version = max(model.ir_version, helper.find_min_ir_version_for(result.opset_import))
    _types(result)  # an older opset may lack a type
    return result


# --- the graph ---------------------------------------------------------------------------------------------------


def _network(graph: GraphProto, types: Types) -> set[int]:
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


def _typed_like_result(node: NodeProto, model: ModelProto, half: int) -> set[int]:
    """The inputs that go to half precision with the result (Resize's scales do not); none if the node must not."""
    known = LAYERS | MOVES | ELEMENTWISE
    if half == TensorProto.BFLOAT16:
        known -= NOT_BF16
    if node.domain not in ("", "ai.onnx") or node.op_type not in known:
        return set()
    schema = onnx.defs.get_schema(node.op_type, _opset(model))
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


def _types(model: ModelProto) -> Types:
    """Every tensor's type, by strict inference, which refuses operands that disagree."""
    try:
        graph = infer_shapes(_without_weights(model), check_type=True, strict_mode=True).graph
    except InferenceError as error:
        raise OptionError(
            f"the types of the graph do not agree: {error}", hint="onnx.checker names the first node that is wrong"
        ) from error
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {weight.name: weight.data_type for weight in model.graph.initializer}


def _without_weights(model: ModelProto) -> ModelProto:
    """The model with its large constants as inputs: small enough for tools that end at 2 GiB."""
    bare = ModelProto(
        ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions,
        graph=GraphProto(
            name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output,
            initializer=[w for w in model.graph.initializer if not _is_large(w)],
        ),
    )  # fmt: skip
    known = {tensor.name for tensor in bare.graph.input}
    for weight in filter(_is_large, model.graph.initializer):
        if weight.name not in known:
            bare.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    return bare


def _is_large(weight: TensorProto) -> bool:
    return math.prod(weight.dims) > SMALL and weight.data_type in (FLOAT, *HALVES.values())


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


def _lift_constants(graph: GraphProto) -> None:
    """Float32 Constant nodes become initializers, as weights are."""
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.attribute[0].t.data_type == FLOAT:
            graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            nodes.append(node)
    _replace(graph, nodes)


def _replace(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """The graph's nodes are these; what was inferred of the old ones goes, and constants that nobody uses."""
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _keep_weights(graph, lambda weight: weight.name in used)


def _keep_weights(graph: GraphProto, wanted: Callable[[TensorProto], bool]) -> None:
    """Only these, in place: to write the list anew would copy gigabytes."""
    for i in reversed(range(len(graph.initializer))):
        if not wanted(graph.initializer[i]):
            del graph.initializer[i]


def _rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for tensors in (node.input, node.output):
            for i, name in enumerate(tensors):
                tensors[i] = names.get(name, name)


def _copy(model: ModelProto) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    return result


def _opset(model: ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


# --- int8 --------------------------------------------------------------------------------------------------------


def quantize(model: ModelProto, feeds: Iterable[Feed], *, tolerance: float = TOLERANCE) -> ModelProto:
    """The denoiser with 8-bit layers: QuantizeLinear and DequantizeLinear, u8 activations, s8 weights per channel.

    feeds: network inputs, {"x": (B, C, H, W), "sigma": (B,)}, from all noise levels: they set the ranges. Layers with
    weights are rounded one at a time on PROBED images of them; those whose errors add up to the tolerance, smallest
    first, become int8, the others stay float32. In a U-Net the costly ones write the finest residual stream.
    """
    feeds = list(feeds)
    if not feeds:
        raise OptionError("int8 needs inputs to set its ranges by", hint="give at least one guide")
    model = widen(model)
    graph = model.graph
    _lift_constants(graph)
    for node in graph.node:
        node.name = node.name or node.output[0]
    weights = {weight.name for weight in graph.initializer}
    network = _network(graph, _types(model))
    inside = [node for number, node in enumerate(graph.node) if number in network]
    layers = [node.name for node in inside if node.op_type in LAYERS and node.input[1] in weights]
    with tempfile.TemporaryDirectory() as folder, _silent():
        source = Path(folder) / "float.onnx"
        onnx.save(_copy(model), source, save_as_external_data=True, location="float.data")
        errors = _errors(model, _calibrated(source, layers, feeds), layers, feeds, Path(folder) / "probe.onnx")
        order = sorted(layers, key=errors.__getitem__)
        total = np.cumsum([errors[name] for name in order])  # bounds the whole error, to first order
        chosen = [name for name, error in zip(order, total, strict=True) if error <= tolerance]
        result = _calibrated(source, chosen, feeds) if chosen else model
    del result.metadata_props[:], result.graph.value_info[:]
    result.metadata_props.extend(model.metadata_props)
    return result


def _calibrated(source: Path, layers: Sequence[str], feeds: Sequence[Feed]) -> ModelProto:
    """These layers of the model in 8 bits, with the ranges seen on the feeds.

    Weights have 7 bits: processors without VNNI add two products in 16 bits, and eight would overflow them.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    target, rest = source.with_name("int8.onnx"), iter(feeds)
    quantize_static(
        source, target, SimpleNamespace(get_next=lambda: next(rest, None)), QuantFormat.QDQ,
        nodes_to_quantize=list(layers), op_types_to_quantize=sorted(LAYERS), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, use_external_data_format=True,
    )  # fmt: skip
    return onnx.load(target)


def _errors(
    model: ModelProto, quantized: ModelProto, layers: Sequence[str], feeds: Sequence[Feed], path: Path
) -> dict[str, float]:
    """The error of D when one layer alone is int8, per layer, at the worst of PROBED images.

    One graph for all of them: the number of that layer is an input, and each layer an If.
    """
    import onnxruntime

    probe = _copy(model)
    graph = probe.graph
    known = {weight.name for weight in graph.initializer}
    graph.initializer.extend(weight for weight in quantized.graph.initializer if weight.name not in known)
    graph.input.append(helper.make_tensor_value_info("int8_layer", TensorProto.INT64, []))
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.name not in layers:
            nodes.append(node)
            continue
        number, chosen = f"{node.name}.number", f"{node.name}.chosen"
        graph.initializer.append(numpy_helper.from_array(np.array(layers.index(node.name)), number))
        nodes.append(helper.make_node("Equal", ["int8_layer", number], [chosen]))
        branches = {
            "then_branch": _branch(_with_rounding(node.name, quantized.graph), f"{node.name}.int8."),
            "else_branch": _branch([node], f"{node.name}.float."),
        }
        nodes.append(helper.make_node("If", [chosen], [node.output[0]], **branches))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(probe, path, save_as_external_data=True, location=f"{path.name}.data")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = np.zeros(len(layers))
    images = [
        {name: values[i : i + 1] for name, values in feed.items()} for feed in feeds for i in range(len(feed["x"]))
    ]
    images.sort(key=lambda feed: abs(feed["sigma"].item() / (feed["sigma"].item() + DECISIVE) - 0.5))
    for feed in images[:PROBED]:
        exact = session.run(None, {**feed, "int8_layer": np.array(-1)})[0]
        size = max(np.linalg.norm(exact), np.linalg.norm(feed["x"] - exact))
        for i in range(len(layers)):
            denoised = session.run(None, {**feed, "int8_layer": np.array(i)})[0]
            worst[i] = max(worst[i], np.linalg.norm(denoised - exact) / size)
    return dict(zip(layers, worst.tolist(), strict=True))


def _with_rounding(layer: str, graph: GraphProto) -> list[NodeProto]:
    """A quantized layer, what rounds its operands, and what rounds its result."""
    producers = {name: node for node in graph.node for name in node.output}
    nodes = [next(node for node in graph.node if node.name == layer)]
    for name in nodes[0].input:
        while name in producers and producers[name].op_type in ROUNDING:
            nodes.insert(0, producers[name])
            name = producers[name].input[0]
    while after := [n for n in graph.node if n.op_type in ROUNDING and n.input[0] == nodes[-1].output[0]]:
        nodes.append(after[0])
    return nodes


def _branch(nodes: Sequence[NodeProto], prefix: str) -> GraphProto:
    """These nodes as the branch of an If, with names of its own."""
    own = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    _rename(own, {name: f"{prefix}{name}" for node in own for name in node.output})
    return helper.make_graph(own, prefix, [], [helper.make_tensor_value_info(own[-1].output[0], FLOAT, None)])


@contextmanager
def _silent() -> Iterator[None]:
    """ONNX Runtime's quantizer logs through the root logger, and would give it a handler."""
    root, handler, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
