"""Reduced precision: which tensors are half, which stay float32, and by how much D moves."""

import glob
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit import artifact
from sdedit.errors import OptionError
from sdedit.export import int8 as int8_of
from sdedit.export.graph import copied, set_opset
from sdedit.export.int8 import quantize
from sdedit.export.precision import emulate, halve, widen
from sdedit.export.to_onnx import halve_weights, trace

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FP16 = 5e-3  # tolerance
SIGMAS = (0.01, 0.1, 0.5, 2.0, 10.0, 80.0)
SIZE = 16


class UNet(nn.Module):
    """D(x; σ) in miniature: what published U-Nets are made of, with EDM's preconditioning."""

    def __init__(self, *, late_scale: bool = False, classes: int = 0, loud: float = 1.0) -> None:
        super().__init__()
        self.late_scale, self.loud = late_scale, loud
        self.register_buffer("frequencies", torch.exp(torch.linspace(-1.0, 2.0, 8)))
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.label = nn.Embedding(classes, 16) if classes else None
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, channels) for channels in (16, 16, 32))
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.qkv, self.project = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)
        self.grow = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)
        self.head = nn.Conv2d(16, 3, 3, padding=1)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, std=0.2)

    def attention(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm2(x) * self.loud).reshape(batch, 3, channels, -1).transpose(-1, -2).unbind(1)
        if self.late_scale:
            h = (q @ k.transpose(-1, -2) * (0.25 / self.loud**2)).softmax(dim=-1) @ v / self.loud
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.project(h.transpose(-1, -2).reshape(batch, channels, height, width))

    def raw(self, x: Tensor, noise_level: Tensor, label: Tensor | None) -> Tensor:
        phase = noise_level[:, None] * self.frequencies
        e = self.embed(torch.cat([phase.cos(), phase.sin()], dim=1))
        if self.label is not None:
            e = e + self.label(label)
        h = self.stem(x)
        inner = h + self.conv1(F.silu(self.norm1(h))) + e[:, :, None, None]
        inner = self.grow(self.attention(F.avg_pool2d(inner, 2)))
        h = torch.cat([h, inner + F.interpolate(inner[..., ::2, ::2], scale_factor=2.0)], dim=1)
        return self.head(self.conv2(F.silu(self.norm3(h))))

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        s = sigma[:, None, None, None]
        variance = s**2 + 0.25
        return 0.25 / variance * x + 0.5 * s / variance.sqrt() * self.raw(x / variance.sqrt(), sigma.log() / 4, label)


def traced(net: nn.Module, conditions: dict | None = None) -> ModelProto:
    return trace(net, (3, SIZE, SIZE), conditions)


@pytest.fixture(scope="module")
def small() -> ModelProto:
    torch.manual_seed(0)
    model = traced(UNet())
    helper.set_model_props(model, {"sdedit": "{}"})
    return model


@pytest.fixture(scope="module")
def bundled() -> ModelProto:
    return onnx.load(artifact.BUNDLED)


@pytest.fixture(scope="module", params=("small", "bundled"))
def model(request: pytest.FixtureRequest) -> ModelProto:
    return request.getfixturevalue(request.param)


def run(model: ModelProto, x: np.ndarray, sigma: np.ndarray, **conditions: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "sigma": sigma, **conditions})[0]


def inputs(size: int = SIZE, sigmas: tuple[float, ...] = SIGMAS) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture under noise of each level: (N, 3, size, size), (N,)."""
    at = np.linspace(-1, 1, size, dtype=np.float32)
    picture = np.stack([np.sin(3 * at[:, None] + at), at[:, None] * at, np.where(at[:, None] + at > 0.3, 0.8, -0.6)])
    sigma = np.array(sigmas, np.float32)
    noise = np.random.default_rng(0).standard_normal((len(sigma), 3, size, size)).astype(np.float32)
    return (picture + sigma[:, None, None, None] * noise).astype(np.float32), sigma


def worst_error(exact: np.ndarray, other: np.ndarray, x: np.ndarray) -> float:
    """max over images of ‖ΔD‖ / max(‖D‖, ‖x - D‖)."""

    def norms(images: np.ndarray) -> np.ndarray:
        return np.linalg.norm(images.reshape(len(images), -1).astype(np.float64), axis=1)

    return float((norms(other - exact) / np.maximum(norms(exact), norms(x - exact))).max())


def types(model: ModelProto) -> dict[str, int]:
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {weight.name: weight.data_type for weight in graph.initializer}


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def reached_from(model: ModelProto, starts: Iterable[str]) -> set[str]:
    """The tensors that depend on these through others than shapes, and these."""
    of, reached = types(model), set(starts)
    for node in model.graph.node:
        if any(name in reached and of[name] != INT64 for name in node.input):
            reached.update(node.output)
    return reached


def weight_of(model: ModelProto, name: str) -> TensorProto:
    return next(weight for weight in model.graph.initializer if weight.name == name)


# --- which tensors are half --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved:
    """A graph in half precision, and what its tensors are."""

    original: ModelProto
    graph: ModelProto
    half: int  # its TensorProto type
    types: dict[str, int]
    from_x: set[str]
    layers: list[onnx.NodeProto]  # of the network


@pytest.fixture(scope="module", params=HALVES)
def halved(request: pytest.FixtureRequest, model: ModelProto) -> Halved:
    graph = halve(model, request.param)
    from_x = reached_from(graph, ["x"])
    layers = [n for n in graph.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and from_x & set(n.input)]
    return Halved(model, graph, HALVES[request.param], types(graph), from_x, layers)


def types_of(halved: Halved, nodes: Iterable[onnx.NodeProto]) -> set[int]:
    """Of all operands and results."""
    return {halved.types[name] for node in nodes for name in (*node.input, *node.output)}


def test_every_layer_that_sees_x_is_half_with_its_weights(halved: Halved) -> None:
    assert len(halved.layers) >= 8
    assert types_of(halved, halved.layers) == {halved.half}


def test_the_time_embedding_stays_float32(halved: Halved) -> None:
    nodes = halved.graph.graph.node
    gemms = [node for node in nodes if node.op_type == "Gemm"]
    assert len(gemms) >= 2
    assert not any(node in halved.layers for node in gemms)
    assert types_of(halved, gemms) == {FLOAT}
    assert types_of(halved, (node for node in nodes if node.op_type in ("Sin", "Cos", "Log", "Reciprocal"))) == {FLOAT}


def test_statistics_and_softmax_are_float32_islands(halved: Halved) -> None:
    islands = [n for n in halved.graph.graph.node if n.op_type in ("InstanceNormalization", "Softmax")]
    assert len(islands) >= 4
    assert types_of(halved, islands) == {FLOAT}


def test_from_a_normalisation_to_the_next_layer_nothing_is_rounded(halved: Halved) -> None:
    producers = {name: node for node in halved.graph.graph.node for name in node.output}
    convs = [node for node in halved.layers if re.search(r"conv\d/Conv$", node.name)]  # each follows GroupNorm and SiLU
    assert len(convs) >= 2
    for conv in convs:
        cast = producers[conv.input[0]]
        silu = producers[cast.input[0]]
        assert (cast.op_type, silu.op_type) == ("Cast", "Mul")
        assert types_of(halved, [silu]) == {FLOAT}


def test_sums_and_concatenations_after_a_layer_are_half(halved: Halved) -> None:
    results = {name for layer in halved.layers for name in layer.output}
    meeting = [n for n in halved.graph.graph.node if n.op_type in ("Add", "Concat") and results & set(n.input)]
    assert len(meeting) >= 2
    assert types_of(halved, meeting) == {halved.half}


def test_before_the_first_layer_and_after_the_last_only_one_cast_rounds(halved: Halved) -> None:
    nodes = list(halved.graph.graph.node)
    from_layers = reached_from(halved.graph, (layer.output[0] for layer in halved.layers))
    before = [node for node in nodes if halved.from_x & set(node.output) and not from_layers & set(node.output)]
    assert [node.op_type for node in before if halved.types[node.output[0]] == halved.half] == ["Cast"]
    last = max(nodes.index(layer) for layer in halved.layers)
    after = [node for node in nodes[last + 1 :] if from_layers & set(node.output)]
    assert after[0].op_type == "Cast"
    assert types_of(halved, after[1:]) <= {FLOAT, INT64}


def test_the_interface_stays_float32_and_the_metadata_stays(halved: Halved) -> None:
    for part in ("input", "output"):
        assert list(getattr(halved.graph.graph, part)) == list(getattr(halved.original.graph, part))
    assert list(halved.graph.metadata_props) == list(halved.original.metadata_props)


def test_no_tensor_is_cast_twice_and_no_weight_at_all(halved: Halved) -> None:
    cast = Counter(node.input[0] for node in halved.graph.graph.node if node.op_type == "Cast")
    assert max(cast.values()) == 1
    assert not cast.keys() & {weight.name for weight in halved.graph.graph.initializer}


def test_shape_arithmetic_is_untouched(halved: Halved) -> None:
    before = types(halved.original)
    assert [n for n, t in halved.types.items() if t == INT64] == [n for n, t in before.items() if t == INT64]


def test_a_half_graph_widens_to_the_operators_it_was_made_from(halved: Halved) -> None:
    wide = widen(halved.graph)
    assert not set(types(wide).values()) & set(HALVES.values())
    assert operators(wide) == operators(widen(halved.original))
    assert widen(wide) == wide


def test_the_error_is_small_at_every_noise_level(halved: Halved) -> None:
    x, sigma = inputs(halved.original.graph.output[0].type.tensor_type.shape.dim[2].dim_value)
    error = worst_error(run(halved.original, x, sigma), run(emulate(halved.graph), x, sigma), x)
    tolerance = 5e-3 if halved.half == TensorProto.FLOAT16 else 3e-2
    assert tolerance / 100 < error < tolerance


def test_transposed_convolutions_are_half_in_float16_only(small: ModelProto) -> None:  # TensorRT has none in bfloat16
    for precision, wanted in (("fp16", TensorProto.FLOAT16), ("bf16", FLOAT)):
        of = types(reduced := halve(small, precision))
        (grow,) = (node for node in reduced.graph.node if node.op_type == "ConvTranspose")
        assert {of[name] for name in (*grow.input, *grow.output)} == {wanted}


def test_bfloat16_raises_the_opset_to_the_first_that_has_its_convolutions(small: ModelProto) -> None:
    assert [halve(small, p).opset_import[0].version for p in ("fp16", "bf16")] == [18, 22]
    assert halve(small, "bf16").ir_version >= 10


def test_class_labels_stay_float32() -> None:
    torch.manual_seed(0)
    labelled = traced(UNet(classes=5), {"class_label": {"dtype": "int64", "count": 5}})
    of = types(reduced := halve(labelled, "fp16"))
    (embedded,) = (node for node in reduced.graph.node if node.op_type == "Gather" and "label" in node.name)
    assert {of[embedded.input[0]], of[embedded.output[0]]} == {FLOAT}
    x, sigma = inputs()
    results = [run(m, x, sigma, class_label=np.arange(len(x)) % 5) for m in (labelled, emulate(reduced))]
    assert worst_error(*results, x) < FP16


def test_a_network_that_ends_in_its_last_layer_still_gives_float32() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.last(self.first(x) / (1 + sigma[:, None, None, None]))

    plain = traced(Plain())
    reduced = halve(plain, "fp16")
    assert types(reduced)["denoised"] == FLOAT
    assert reduced.graph.node[-1].op_type == "Cast"
    back = widen(reduced)
    assert operators(back) == operators(plain)
    x, sigma = inputs()
    assert worst_error(run(plain, x, sigma), run(back, x, sigma), x) < 1e-3


def test_tied_weights_are_stored_once_in_half() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.b.load_state_dict(self.a.state_dict())  # the exporter writes one, and an Identity

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.b(self.a(x)).sigmoid() * sigma[:, None, None, None]

    tied = traced(Tied())
    assert "Identity" in {node.op_type for node in tied.graph.node}
    reduced = halve(tied, "fp16")
    assert [weight.data_type for weight in reduced.graph.initializer] == [TensorProto.FLOAT16] * 2
    assert "Identity" not in {node.op_type for node in reduced.graph.node}


@pytest.mark.parametrize(("precision", "wanted"), [("fp16", TensorProto.FLOAT16), ("bf16", FLOAT)])
def test_an_operator_without_bfloat16_stays_float32_there(precision: str, wanted: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["q"]),
        helper.make_node("Einsum", ["q", "q"], ["qk"], equation="bcij,bckj->bcik"),
        helper.make_node("Conv", ["qk", "w"], ["denoised"]),
    ]
    assert types(halve(one_input(nodes, {"w": np.ones((2, 2, 1, 1), np.float32)}), precision))["qk"] == wanted


# --- values ------------------------------------------------------------------------------------------------------


def test_float16_runs_as_it_is(small: ModelProto) -> None:
    x, sigma = inputs()
    assert worst_error(run(small, x, sigma), run(halve(small, "fp16"), x, sigma), x) < FP16


def test_activations_whose_squares_leave_float16_are_normalised_all_the_same() -> None:
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        net.stem.weight *= 3000
    loud = traced(net)
    x, sigma = inputs()
    assert worst_error(run(loud, x, sigma), run(emulate(halve(loud, "fp16")), x, sigma), x) < FP16


def test_scores_are_scaled_before_the_product_and_cannot_overflow() -> None:
    torch.manual_seed(0)
    late = traced(UNet(late_scale=True, loud=100.0))
    reduced = emulate(halve(late, "fp16"))
    scale = next(i for i, node in enumerate(late.graph.node) if "Softmax" in node.op_type) - 1
    assert late.graph.node[scale].op_type == "Mul"
    x, sigma = inputs()
    denoised = run(reduced, x, sigma)
    assert np.isfinite(denoised).all()
    assert worst_error(run(late, x, sigma), denoised, x) < FP16


def test_scores_that_are_used_twice_stay_as_they_are() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["q"]),
        helper.make_node("MatMul", ["q", "q"], ["qk"]),
        helper.make_node("Mul", ["scale", "qk"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("Add", ["weights", "qk"], ["both"]),
        helper.make_node("Conv", ["both", "w"], ["denoised"]),
    ]
    weights = {"w": np.full((2, 2, 1, 1), 0.7, np.float32), "scale": np.array(0.3, np.float32)}
    model = one_input(nodes, weights)
    x = np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)
    exact, reduced = (onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
                      for m in (model, emulate(halve(model, "fp16"))))  # fmt: skip
    assert worst_error(exact, reduced, x) < FP16


# --- emulation ---------------------------------------------------------------------------------------------------


def two_layers(first: np.ndarray, second: np.ndarray, gain: float) -> ModelProto:
    """denoised = second (h + gain·h) + x with h = relu(first x), all convolutions 1x1."""
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("Mul", ["h", "gain"], ["g"]),
        helper.make_node("Add", ["h", "g"], ["s"]),
        helper.make_node("Conv", ["s", "second"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["denoised"]),
    ]
    return one_input(nodes, {"first": first, "second": second, "gain": np.array(gain, np.float32)})


def one_input(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> ModelProto:
    """A graph from x to denoised, both (B, 2, 8, 8)."""
    image = [helper.make_tensor_value_info(name, FLOAT, ["B", 2, 8, 8]) for name in ("x", "denoised")]
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "by hand", image[:1], image[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_emulation_gives_the_very_values_of_rounding_after_each_operation(precision: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 2, 2, 1, 1)).astype(np.float32)
    x = rng.standard_normal((5, 2, 8, 8)).astype(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    def conv(values: np.ndarray, weight: np.ndarray) -> np.ndarray:  # products are exact, the sum of two rounds once
        w = rounded(weight)[:, :, 0, 0]
        terms = [values[:, None, i] * w[None, :, i, None, None] for i in range(2)]
        return rounded(terms[0] + terms[1])

    h = np.maximum(conv(rounded(x), first), 0)
    s = rounded(h + rounded(h * rounded(np.float32(0.3))))
    expected = conv(s, second) + x

    emulated = emulate(halve(two_layers(first, second, 0.3), precision))
    session = onnxruntime.InferenceSession(emulated.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    assert set(types(emulated).values()) == {FLOAT, HALVES[precision]}  # the latter between two Casts only


def test_rounding_is_to_nearest_even() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32).reshape(2, 1, 1, 1).repeat(2, axis=1)
    reduced = halve(two_layers(ties, ties, 1.0), "bf16")
    stored = numpy_helper.to_array(weight_of(reduced, "first"))[:, 0, 0, 0]
    np.testing.assert_array_equal(stored.astype(np.float32), np.float32([1.0, 1 + 2**-6]))


# --- back to float32 ---------------------------------------------------------------------------------------------


def test_weights_stored_as_float16_are_folded_and_nothing_changes(small: ModelProto) -> None:
    stored = ModelProto()
    stored.CopyFrom(small)
    halve_weights(stored)
    assert TensorProto.FLOAT16 in types(stored).values()
    folded = widen(stored)
    assert TensorProto.FLOAT16 not in types(folded).values()
    assert {w.name for w in folded.graph.initializer} == {w.name for w in small.graph.initializer}
    np.testing.assert_array_equal(run(folded, *inputs()), run(stored, *inputs()))
    assert halve(stored, "fp16") == halve(folded, "fp16")


def test_half_precision_widened_halves_to_the_same_weights(small: ModelProto) -> None:
    once = halve(small, "fp16")
    again = halve(widen(once), "fp16")
    assert sorted(w.SerializeToString() for w in again.graph.initializer) == sorted(
        w.SerializeToString() for w in once.graph.initializer
    )


def test_a_foreign_half_interface_widens_too() -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 2]) for name in ("x", "denoised")]
    node = helper.make_node("Add", ["x", "x"], ["denoised"])
    foreign = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), ir_version=8)
    assert set(types(widen(foreign)).values()) == {FLOAT}


def test_the_argument_is_left_as_it_was(small: ModelProto) -> None:
    before = small.SerializeToString(deterministic=True)
    for precision in HALVES:
        emulate(halve(small, precision))
    widen(small)
    set_opset(small, 20)
    assert small.SerializeToString(deterministic=True) == before


# --- opsets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "opset"), [*(("small", opset) for opset in range(18, 23)), ("bundled", 22)])
def test_every_opset_computes_the_same(request: pytest.FixtureRequest, name: str, opset: int) -> None:
    model = request.getfixturevalue(name)
    written = set_opset(model, opset)
    assert written.opset_import[0].version == opset
    assert list(written.metadata_props) == list(model.metadata_props)
    assert [i.name for i in written.graph.input] == ["x", "sigma"]
    types(written)
    x, sigma = inputs(written.graph.output[0].type.tensor_type.shape.dim[2].dim_value, (0.1, 5.0))
    np.testing.assert_array_equal(run(written, x, sigma), run(model, x, sigma))


@pytest.mark.parametrize("opset", [16, 17, 23])
def test_an_opset_outside_the_range_is_refused(small: ModelProto, opset: int) -> None:
    with pytest.raises(OptionError) as caught:
        set_opset(small, opset)
    assert str(caught.value) == f"opset is {opset}; wanted 18 to 22"
    assert caught.value.hint == "--opset 18"


def test_bfloat16_cannot_go_back_to_an_older_opset(small: ModelProto) -> None:
    with pytest.raises(OptionError, match=r"the graph cannot be written in opset 18: .*'Conv' is unallowed for Opset"):
        set_opset(halve(small, "bf16"), 18)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_weight_beyond_float16_is_refused_and_bfloat16_takes_it() -> None:
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] = -1e5
    large = traced(net)
    with pytest.raises(OptionError) as caught:
        halve(large, "fp16")
    assert str(caught.value) == "conv1.weight has values up to 1e+05; float16 ends at 65504"
    assert caught.value.hint == "--precision bf16, which has float32's range"
    assert weight_of(halve(large, "bf16"), "conv1.weight").data_type == TensorProto.BFLOAT16


def test_infinite_constants_are_no_overflow() -> None:
    weight = np.full((2, 2, 1, 1), -np.inf, np.float32)
    assert halve(two_layers(weight, weight, 1.0), "fp16")


def test_a_graph_whose_layers_do_not_see_x_is_refused(small: ModelProto) -> None:
    model = two_layers(np.ones((2, 2, 1, 1), np.float32), np.ones((2, 2, 1, 1), np.float32), 1.0)
    for node in model.graph.node:
        node.input[:] = ["image" if name == "x" else name for name in node.input]
    model.graph.input[0].name = "image"
    with pytest.raises(OptionError, match="no layer of the graph depends on its input x"):
        halve(model, "fp16")


def test_a_graph_with_branches_is_refused() -> None:
    model = two_layers(np.ones((2, 2, 1, 1), np.float32), np.ones((2, 2, 1, 1), np.float32), 1.0)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "b", [], [helper.make_tensor_value_info("y", FLOAT, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node[1].CopyFrom(
        helper.make_node("If", ["yes"], ["i"], "choice", then_branch=branch, else_branch=branch)
    )
    model.graph.node.insert(2, helper.make_node("Add", ["i", "a"], ["h"]))
    with pytest.raises(OptionError, match="If choice holds a graph of its own"):
        halve(model, "fp16")


def test_operands_that_disagree_are_refused() -> None:
    model = two_layers(np.ones((2, 2, 1, 1), np.float32), np.ones((2, 2, 1, 1), np.float64), 1.0)
    with pytest.raises(OptionError, match=r"the types of the graph do not agree: .*Conv"):
        halve(model, "fp16")


# --- int8 --------------------------------------------------------------------------------------------------------


def feeds(size: int = SIZE) -> list[dict[str, np.ndarray]]:
    x, sigma = inputs(size, tuple(np.geomspace(0.01, 80, 8)))
    return [{"x": x[i : i + 2], "sigma": sigma[i : i + 2]} for i in range(0, 8, 2)]


@pytest.fixture(scope="module")
def int8(small: ModelProto) -> ModelProto:
    return quantize(small, feeds(), tolerance=1e-3)


def eight_bit_layers(model: ModelProto) -> list[str]:
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and producers.get(node.input[0]) == producers.get(node.input[1]) == "DequantizeLinear"
    ]


def test_int8_layers_have_unsigned_activations_and_signed_weights_per_channel(int8: ModelProto) -> None:
    of = types(int8)
    names = eight_bit_layers(int8)
    assert len(names) >= 3
    producers = {name: node for node in int8.graph.node for name in node.output}
    for node in (node for node in int8.graph.node if node.name in names and node.op_type == "Conv"):
        activation, weight = (producers[name] for name in node.input[:2])
        assert of[activation.input[0]] == TensorProto.UINT8
        assert of[weight.input[0]] == TensorProto.INT8
        assert math.prod(weight_of(int8, weight.input[1]).dims) == weight_of(int8, weight.input[0]).dims[0] > 1


def test_int8_leaves_the_time_embedding_and_the_interface_alone(small: ModelProto, int8: ModelProto) -> None:
    gemms = [node for node in int8.graph.node if node.op_type == "Gemm"]
    assert gemms
    assert not {node.name for node in gemms} & set(eight_bit_layers(int8))
    assert all(weight_of(int8, node.input[1]).data_type == FLOAT for node in gemms)
    assert list(int8.graph.input) == list(small.graph.input)
    assert list(int8.graph.output) == list(small.graph.output)
    assert list(int8.metadata_props) == list(small.metadata_props)


def test_int8_keeps_to_the_tolerance_by_leaving_layers_in_float32(small: ModelProto, int8: ModelProto) -> None:
    x, sigma = inputs(sigmas=(0.02, 0.3, 3.0, 30.0))
    exact = run(small, x, sigma)
    everything = quantize(small, feeds())
    assert len(eight_bit_layers(int8)) < len(eight_bit_layers(everything)) == 7
    assert worst_error(exact, run(int8, x, sigma), x) < 1e-3
    assert 1e-3 < worst_error(exact, run(everything, x, sigma), x) < 5e-3  # 2e-2 where products overflow 16 bits


def test_int8_takes_as_many_layers_as_keep_the_tolerance(small: ModelProto) -> None:
    counts = []
    for tolerance in (3e-4, 1e-3, 3e-3, 1.0):
        made = quantize(small, feeds(), tolerance=tolerance)
        counts.append(len(eight_bit_layers(made)))
        for feed in feeds():
            x, sigma = feed["x"], feed["sigma"]
            assert worst_error(run(small, x, sigma), run(made, x, sigma), x) <= tolerance
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 7


def test_a_result_that_errs_too_much_elsewhere_is_made_again_with_fewer_layers(small: ModelProto) -> None:
    asked: list[int] = []

    def excess(made: ModelProto) -> float:
        asked.append(len(eight_bit_layers(made)))
        return 1.0 if len(asked) == 3 else math.nextafter(1, 2)

    made = quantize(small, feeds(), tolerance=3e-3, excess=excess)
    assert len(eight_bit_layers(made)) == asked[-1]
    assert asked == sorted(set(asked), reverse=True)
    assert eight_bit_layers(quantize(small, feeds(), tolerance=3e-3, excess=lambda _: 2.0)) == []


def test_the_search_after_a_refusal_starts_from_the_numbers_already_compared(
    small: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    real = int8_of._denoised

    def watched(path: Path, feeds: Sequence[int8_of.Feed]) -> Iterator[int8_of.Array]:
        compared.append(len(eight_bit_layers(onnx.load(path))))
        return real(path, feeds)

    def excess(made: ModelProto) -> float:
        refused.append(len(compared))
        return 0.0 if len(refused) == 2 else math.nextafter(1, 2)

    refused: list[int] = []
    monkeypatch.setattr(int8_of, "_denoised", watched)
    quantize(small, feeds(), excess=excess)
    before, after = compared[1 : refused[0]], compared[refused[0] :]  # the first is the exact model
    assert len(compared) == len(set(compared))
    assert all(count > min(before) for count in after)


def test_layers_that_do_not_err_are_left_out_where_they_err_elsewhere(small: ModelProto) -> None:
    blank = copied(small)
    for weight in blank.graph.initializer:
        if len(weight.dims) == 4:
            weight.CopyFrom(numpy_helper.from_array(np.zeros(weight.dims, np.float32), weight.name))
    assert eight_bit_layers(quantize(blank, feeds()))
    assert eight_bit_layers(quantize(blank, feeds(), excess=lambda _: 2.0)) == []


@pytest.mark.parametrize("unknown", [math.inf, math.nan])
def test_an_excess_that_is_no_number_leaves_some_layers(small: ModelProto, unknown: float) -> None:
    answers = [unknown, 0.0]
    made = quantize(small, feeds(), tolerance=3e-3, excess=lambda _: answers.pop(0))
    assert not answers
    assert eight_bit_layers(made)


def test_the_tolerance_becomes_smaller_by_what_was_too_much(small: ModelProto) -> None:
    answers = [10.0, 0.0]
    made = quantize(small, feeds(), tolerance=3e-3, excess=lambda _: answers.pop(0))
    assert not answers
    exact, *rounded = (
        [run(model, feed["x"], feed["sigma"]) for feed in feeds()]
        for model in (small, made, quantize(small, feeds(), tolerance=3e-3))
    )
    worst, before = (
        max(worst_error(e, r, feed["x"]) for e, r, feed in zip(exact, these, feeds(), strict=True)) for these in rounded
    )
    assert 0 < worst <= int8_of.LESS * before / 10


def test_layers_of_large_images_are_compared_at_two_levels_that_are_not_the_ends(
    small: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_of, "PROBED", 0)
    levels: list[float] = []

    def watched(session: onnxruntime.InferenceSession, names: object, feed: dict[str, np.ndarray]) -> Any:
        if "int8_layer" in feed:
            levels.extend(feed["sigma"])
        return run_session(session, names, feed)

    run_session = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", watched)
    quantize(small, feeds())
    assert set(levels) == {np.float32(level) for level in np.geomspace(0.01, 80, 8)[[2, 6]]}


def test_no_tolerance_at_all_is_float32(small: ModelProto) -> None:
    exact = quantize(small, feeds(), tolerance=0.0)
    assert eight_bit_layers(exact) == []
    np.testing.assert_array_equal(run(exact, *inputs()), run(small, *inputs()))
    assert list(exact.metadata_props) == list(small.metadata_props)


def skip_connection() -> ModelProto:
    """D = first(x) + second(first(x)): two layers, and a reader of their tensor that is none."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((3, 3, 1, 1)).astype(np.float32), f"{name}.weight")
        for name in ("first", "second")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["t"], "first"),
        helper.make_node("Conv", ["t", "second.weight"], ["u"], "second"),
        helper.make_node("Add", ["t", "u"], ["D"], "add"),
    ]
    x, sigma, out = (
        helper.make_tensor_value_info(name, FLOAT, shape)
        for name, shape in (("x", ["B", 3, SIZE, SIZE]), ("sigma", ["B"]), ("D", ["B", 3, SIZE, SIZE]))
    )
    graph = helper.make_graph(nodes, "skip", [x, sigma], [out], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("chosen", [{"first"}, {"second"}, {"first", "second"}])
def test_only_a_chosen_layers_own_operands_and_result_are_rounded(chosen: set[str], tmp_path: Path) -> None:
    model = skip_connection()
    onnx.save(model, tmp_path / "float.onnx")
    both = int8_of._calibrated(tmp_path / "float.onnx", tmp_path / "int8.onnx", ["first", "second"], feeds())
    made = int8_of._with_layers(model, both, chosen)
    types(made)
    assert set(eight_bit_layers(made)) == chosen
    producers = {name: node.op_type for node in made.graph.node for name in node.output}
    add = next(node for node in made.graph.node if node.op_type == "Add")
    rounded = [producers[name] == "DequantizeLinear" for name in add.input]
    assert rounded == ["first" in chosen, "second" in chosen]
    x, sigma = feeds()[-1].values()  # of the largest values, which the ranges are for
    assert worst_error(run(model, x, sigma), run(made, x, sigma), x) < 6e-2


def test_int8_leaves_no_files_no_handlers_and_no_output(
    small: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before, handlers = small.SerializeToString(deterministic=True), list(logging.getLogger().handlers)
    quantize(small, iter(feeds()))
    assert glob.glob("**", root_dir=tmp_path, recursive=True, include_hidden=True) in ([], [""])
    assert list(logging.getLogger().handlers) == handlers
    assert logging.root.manager.disable == logging.NOTSET
    assert small.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
