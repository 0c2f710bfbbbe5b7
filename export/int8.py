"""A denoiser's graph with 8-bit layers, as many as the tolerance allows."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sdedit import verify
from sdedit.export.graph import FLOAT, LAYERS, copied, lift_constants, network, rename, replace_nodes, types_of
from sdedit.export.precision import widen

ROUNDING = {"DequantizeLinear", "QuantizeLinear"}
MOST = 0.04  # of D, as ‖ΔD‖ / max(‖D‖, ‖x - D‖), at any noise level; `verify` allows a little more, on other images
LESS = 0.9  # of the tolerance that the excess allows
PROBED = 5 * 64 * 64  # pixels on which layers are compared, of images at noise levels spread over all
LEAST_PROBED = 2  # images, however large

Array = NDArray[np.generic]
Feed = Mapping[str, Array]


def quantize(
    model: ModelProto,
    feeds: Iterable[Feed],
    *,
    tolerance: float = MOST,
    excess: Callable[[ModelProto], float] = lambda _: 0.0,
) -> ModelProto:
    """The denoiser with 8-bit layers: QuantizeLinear and DequantizeLinear, u8 activations, s8 weights per channel.

    feeds: network inputs, {"x": (B, C, H, W), "sigma": (B,)}, from all noise levels: they set the ranges. Layers with
    weights are rounded one at a time on a few images of them. As many of those that err least become int8 as keep the
    tolerance together, on every image; the others stay float32, if need be all. In a U-Net the costly ones write the
    finest residual stream. excess: is asked for the error of the result elsewhere, as a multiple of what is allowed
    there; above 1 (or NaN) there are fewer layers, of a tolerance that much smaller.
    """
    feeds = list(feeds)
    model = widen(model)
    graph = model.graph
    lift_constants(graph)
    for node in graph.node:
        node.name = node.name or node.output[0]
    weights = {weight.name for weight in graph.initializer}
    inside = network(graph, types_of(model))
    layers = [
        node.name
        for number, node in enumerate(graph.node)
        if number in inside and node.op_type in LAYERS and node.input[1] in weights
    ]
    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        _save(model, exact)
        with _silent():
            all_rounded = _calibrated(exact, rounded, layers, feeds)
            errors = _errors(model, all_rounded, layers, feeds, Path(folder) / "probe.onnx")
            wanted = list(_denoised(exact, feeds))
        order = sorted(layers, key=errors.__getitem__)
        worst = {0: 0.0}  # error with so many layers; with too many, one above the tolerance

        def keeps(count: int) -> bool:
            if count not in worst:
                _save(_with_layers(model, all_rounded, set(order[:count])), rounded)
                worst[count] = 0.0
                for error in _each_error(feeds, wanted, _denoised(rounded, feeds)):
                    worst[count] = max(worst[count], error if np.isfinite(error) else np.inf)
                    if worst[count] > tolerance:
                        break
            return worst[count] <= tolerance

        while True:
            fewest = max(count for count, error in worst.items() if error <= tolerance)
            most = min((count - 1 for count, error in worst.items() if error > tolerance), default=len(order))
            while fewest < most:
                count = (fewest + most + 1) // 2
                fewest, most = (count, most) if keeps(count) else (fewest, count - 1)
            result = _with_layers(model, all_rounded, set(order[:fewest]))
            del result.graph.value_info[:]
            if fewest == 0 or (too_large := excess(result)) <= 1:
                return result
            tolerance = worst[fewest] * (LESS / too_large if np.isfinite(too_large) else LESS)
            worst[fewest] = np.inf  # where `excess` looks


def _calibrated(source: Path, target: Path, layers: Sequence[str], feeds: Sequence[Feed]) -> ModelProto:
    """These layers of the model in 8 bits, with the ranges seen on the feeds.

    Weights have 7 bits: processors without VNNI add two products in 16 bits, and eight would overflow them.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    rest = iter(feeds)
    quantize_static(
        source, target, SimpleNamespace(get_next=lambda: next(rest, None)), QuantFormat.QDQ,
        nodes_to_quantize=list(layers), op_types_to_quantize=sorted(LAYERS), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, use_external_data_format=True,
    )  # fmt: skip
    return onnx.load(target)


def _with_layers(model: ModelProto, all_rounded: ModelProto, chosen: Set[str]) -> ModelProto:
    """The model with these of its layers in 8 bits. What else reads their inputs reads them unrounded."""
    result = copied(model)
    graph = result.graph
    _add_weights(graph, all_rounded.graph)
    nodes: dict[str, NodeProto] = {}
    rounded: dict[str, NodeProto] = {}  # of these; what rounds a tensor that several layers read is there once
    results: dict[str, str] = {}  # of chosen layers: rounded -> as the model calls it
    for node in graph.node:
        if node.name in chosen:
            layer = _copies(_with_rounding(node.name, all_rounded.graph))
            rounded |= {one.name: one for one in layer}
            nodes |= rounded
            results[layer[-1].output[0]] = node.output[0]
        else:
            nodes[node.name] = node
    inner = {name: f"{name}.int8" for one in rounded.values() for name in one.output}
    rename(rounded.values(), inner | results)
    replace_nodes(graph, list(nodes.values()))
    return result


def _denoised(path: Path, feeds: Sequence[Feed]) -> Iterator[Array]:
    """D of every feed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return (session.run(None, dict(feed))[0] for feed in feeds)


def _each_error(feeds: Sequence[Feed], exact: Sequence[Array], rounded: Iterable[Array]) -> Iterator[float]:
    """The error of D of each image of the feeds."""
    for feed, *denoised in zip(feeds, exact, rounded, strict=True):
        for x, wanted, found in zip(feed["x"], *denoised, strict=True):
            yield verify.relative_error(x, wanted, found)


def _errors(
    model: ModelProto, all_rounded: ModelProto, layers: Sequence[str], feeds: Sequence[Feed], path: Path
) -> dict[str, float]:
    """The error of D when one layer alone is int8, per layer, at the worst of a few images.

    One graph for all of them: the number of that layer is an input, and each layer an If.
    """
    import onnxruntime

    probe = copied(model)
    graph = probe.graph
    _add_weights(graph, all_rounded.graph)
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
            "then_branch": _branch(_with_rounding(node.name, all_rounded.graph), f"{node.name}.int8."),
            "else_branch": _branch([node], f"{node.name}.float."),
        }
        nodes.append(helper.make_node("If", [chosen], [node.output[0]], **branches))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _save(probe, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = np.zeros(len(layers))
    images = [
        {name: values[i : i + 1] for name, values in feed.items()} for feed in feeds for i in range(len(feed["x"]))
    ]
    images.sort(key=lambda feed: float(feed["sigma"].item()))
    count = max(LEAST_PROBED, PROBED // math.prod(images[0]["x"].shape[2:]))
    middles = (np.arange(count) + 0.5) * len(images) / count  # of equal parts, from low noise to high
    for feed in [images[i] for i in np.unique(middles.astype(int))]:
        exact = session.run(None, {**feed, "int8_layer": np.array(-1)})[0]
        for i in range(len(layers)):
            denoised = session.run(None, {**feed, "int8_layer": np.array(i)})[0]
            error = verify.relative_error(feed["x"], exact, denoised)
            worst[i] = max(worst[i], error if math.isfinite(error) else math.inf)
    return dict(zip(layers, worst.tolist(), strict=True))


def _save(model: ModelProto, path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save(copied(model), path, save_as_external_data=True, location=data.name)


def _add_weights(graph: GraphProto, other: GraphProto) -> None:
    """Those of another graph that this one lacks."""
    known = {weight.name for weight in graph.initializer}
    graph.initializer.extend(weight for weight in other.initializer if weight.name not in known)


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
    own = _copies(nodes)
    rename(own, {name: f"{prefix}{name}" for node in own for name in node.output})
    return helper.make_graph(own, prefix, [], [helper.make_tensor_value_info(own[-1].output[0], FLOAT, None)])


def _copies(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    return [NodeProto.FromString(node.SerializeToString()) for node in nodes]


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
