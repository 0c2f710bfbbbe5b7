"""The operators that the package brings for ONNX Runtime on a CPU: what they compute, and what they stand in for."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from closed_form import SDES, metadata, save
from onnx import helper, numpy_helper
from PIL import Image

import sdedit
from sdedit import record
from sdedit.backends import ort_cache, ort_graph
from sdedit.backends.ort_fusion import fuse
from sdedit.backends.ort_nodes import HALVES
from sdedit.cli import doctor
from sdedit.cli.main import main
from sdedit.operators import graph, ship, shipped

MANIFEST = json.loads((ship.FOLDER / ship.MANIFEST).read_text("utf-8"))
RANDOM = np.random.default_rng(7)
NOTHING = (0, 0, 0, 0)  # pads

needs_library = pytest.mark.skipif(not shipped._vector_unit(), reason="the operators are for Linux on x86-64 with AVX2")
pytestmark = pytest.mark.filterwarnings("error")


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def session(
    model: onnx.ModelProto | bytes | str, threads: int = 2, optimised: bool = True
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ort_graph.know_operators(options)
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def model_of(nodes, constants, inputs, output="y", rank=4) -> onnx.ModelProto:
    """Inputs are arrays; every one may have any shape of as many dimensions."""
    value = [helper.make_tensor_value_info(name, 1, [None] * array.ndim) for name, array in inputs.items()]
    out = [helper.make_tensor_value_info(output, 1, [None] * rank)]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", value, out, held)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("sdedit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def used(wanted: int, name: str):
    """What `name` names, on that vector unit."""
    library = ctypes.CDLL(str(shipped.LIBRARY))
    if library.sdedit_use_vector_unit(wanted) != wanted:
        library.sdedit_use_vector_unit(max(shipped.UNITS))
        pytest.skip(f"this processor has no {name}")
    yield name
    library.sdedit_use_vector_unit(max(shipped.UNITS))


@pytest.fixture(params=shipped.UNITS.items(), ids=shipped.UNITS.values())
def unit(request):
    """The tests that use it run on each vector unit of this processor."""
    yield from used(*request.param)


# --- the library -------------------------------------------------------------------------------------------------


def test_it_was_made_from_these_sources():
    assert MANIFEST["source_sha256"] == ship.source_sha256(), "python -m sdedit.operators.ship"
    assert MANIFEST["library_sha256"] == hashlib.sha256(shipped.LIBRARY.read_bytes()).hexdigest()
    flags = {"all": ship.FLAGS, "kernels.cpp": ship.UNITS, "link": ship.LINK}
    assert MANIFEST["flags"] == json.loads(json.dumps(flags))


def test_it_is_small():
    assert shipped.LIBRARY.stat().st_size < 250_000


@needs_library
def test_it_wants_no_library_but_the_c_library_of_2011():
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("needs readelf")
    command = [tool, "--wide", "--dynamic", "--dyn-syms", shipped.LIBRARY]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in told.splitlines() if "NEEDED" in line] == ["[libc.so.6]"]
    versions = {part.split("@GLIBC_")[1].rstrip(")") for part in told.split() if "@GLIBC_" in part}
    assert versions
    assert all(tuple(map(int, version.split("."))) <= (2, 14) for version in versions)


@needs_library
def test_shipping_makes_a_library_that_computes_the_same_bits(tmp_path, monkeypatch):
    include = ship.headers()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and ONNX Runtime's headers")
    manifest = ship.ship(tmp_path, include)
    assert manifest == json.loads((tmp_path / ship.MANIFEST).read_text("utf-8"))
    assert manifest["source_sha256"] == MANIFEST["source_sha256"]
    x, weights = floats(1, 16, 24, 24), floats(20, 16, 3, 3)
    made = convolved(x, weights)
    monkeypatch.setattr(shipped, "LIBRARY", tmp_path / shipped.LIBRARY.name)
    if manifest["compiler"] == MANIFEST["compiler"]:
        assert np.array_equal(convolved(x, weights), made)
    assert np.allclose(convolved(x, weights), made, atol=1e-5)


# --- Conv --------------------------------------------------------------------------------------------------------


def convolved(x, weights, bias=None, add=None, pads=(1, 1, 1, 1), strides=(1, 1), threads=2, half=None):
    constants = {"w": weights} | ({} if bias is None else {"b": bias})
    inputs = {"x": x} | ({} if add is None else {"add": add})
    names = ["x", "w", "" if bias is None else "b", "" if add is None else "add"]
    node = helper.make_node("Conv", names, ["y"], domain="sdedit", pads=pads, strides=strides, half=HALVES.index(half))
    return session(model_of([node], constants, inputs), threads).run(None, inputs)[0]


def expected(x, weights, bias=None, add=None, pads=(1, 1, 1, 1), strides=(1, 1)):
    """The definition, in float64."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[2:], axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    y = np.einsum("nchwij,ocij->nohw", windows, weights.astype(np.float64))
    y = y if bias is None else y + bias[:, None, None]
    return y if add is None else y + add


def assert_close(ours, exact, terms: int) -> None:
    """terms: how many products of numbers near one are summed."""
    assert ours.shape == exact.shape
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).max() <= 1e-5 * np.sqrt(terms)


SHAPES = [  # n, ci, co, h, w
    (1, 16, 16, 64, 64),  # a vector of tiles is a part of a line
    (1, 8, 12, 16, 256),
    (1, 64, 70, 32, 32),  # and several lines
    (2, 17, 5, 16, 16),
    (1, 32, 3, 61, 47),  # sides that are no multiples of a tile
    (1, 9, 13, 33, 130),
    (3, 8, 24, 20, 4),
    (1, 40, 30, 7, 100),
    (1, 128, 64, 8, 8),  # few tiles
    (5, 24, 12, 8, 8),
    (1, 3, 20, 40, 40),  # few channels
    (1, 1, 1, 3, 3),
    (1, 12, 6, 1, 1),
    (2, 10, 10, 1, 50),
]


@needs_library
@pytest.mark.parametrize(("n", "ci", "co", "h", "w"), SHAPES)
def test_a_convolution_is_that_of_the_definition(unit, n, ci, co, h, w):
    x, weights, bias = floats(n, ci, h, w), floats(co, ci, 3, 3), floats(co)
    assert_close(convolved(x, weights, bias), expected(x, weights, bias), 9 * ci)


@needs_library
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 3), (4, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0), (2, 1, 0, 3)])
def test_every_kernel_stride_and_padding_is_that_of_the_definition(unit, kernel, strides, pads):
    for side in ((21, 38), (5, 5)):
        x, weights = floats(2, 10, *side), floats(14, 10, *kernel)
        ours = convolved(x, weights, pads=pads, strides=strides)
        assert_close(ours, expected(x, weights, pads=pads, strides=strides), 10 * kernel[0] * kernel[1])


@needs_library
@pytest.mark.parametrize(("kernel", "pads"), [((1, 1), (1, 2, 1, 2)), ((2, 2), (2, 9, 0, 4)), ((1, 1), (0, 40, 0, 0))])
def test_more_padding_than_kernel_is_that_of_the_definition_every_time(unit, kernel, pads):
    x, weights = floats(1, 64, 15, 15), floats(20, 64, *kernel)
    exact = expected(x, weights, pads=pads)
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="sdedit", pads=pads, strides=[1, 1], half=0)
    ran = session(model_of([node], {"w": weights}, {"x": x}))
    for _ in range(100):  # by two threads, whose pieces lie beside each other
        assert_close(ran.run(None, {"x": x})[0], exact, 256)


@needs_library
def test_a_stride_that_keeps_the_size_is_no_step_of_one(unit):
    x, weights, told = floats(1, 3, 2, 2), floats(4, 3, 1, 1), {"pads": (1, 1, 0, 0), "strides": (2, 2)}
    assert_close(convolved(x, weights, **told), expected(x, weights, **told), 3)


ADDED = [  # the shape of what is added to (2, 14, 24, 20)
    (2, 14, 24, 20), (2, 14, 1, 1), (1, 14, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1), (14, 1, 1), (), (20,),
    (1, 14, 24, 20), (2, 1, 24, 20), (24, 1),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("shape", ADDED)
def test_what_is_added_is_repeated_as_onnx_says(unit, shape):
    x, weights, bias, add = floats(2, 9, 24, 20), floats(14, 9, 3, 3), floats(14), floats(*shape)
    assert_close(convolved(x, weights, bias, add), expected(x, weights, bias, add), 81)


@needs_library
@pytest.mark.parametrize("shape", [(4, 14, 1, 1), (1, 14, 30, 50), (3, 14, 5, 6)])
def test_a_convolution_is_repeated_too_where_what_is_added_is_larger(unit, shape):
    x, weights, add = floats(1, 9, 1, 1), floats(14, 9, 1, 1), floats(*shape)
    nothing = (0, 0, 0, 0)
    assert_close(convolved(x, weights, None, add, nothing), expected(x, weights, None, add, nothing), 9)


@needs_library
def test_no_pictures_make_no_pictures(unit):
    assert convolved(floats(0, 9, 8, 8), floats(4, 9, 3, 3)).shape == (0, 4, 8, 8)


@needs_library
@pytest.mark.parametrize("side", [(36, 28), (8, 8), (16, 16), (12, 20), (3, 70)])
def test_a_picture_has_the_same_bits_alone_in_a_batch_and_by_any_number_of_threads(unit, side):
    x, weights = floats(5, 24, *side), floats(31, 24, 3, 3)
    batch = convolved(x, weights)
    for number in range(5):
        assert np.array_equal(convolved(x[number : number + 1], weights)[0], batch[number])
    assert np.array_equal(convolved(x, weights, threads=1), batch)
    assert np.array_equal(convolved(x, weights, threads=5), batch)


@needs_library
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spreads_no_further_than_its_tiles(unit, value):
    x = floats(1, 16, 64, 64)
    x[0, 3, 10, 20] = value
    y = convolved(x, floats(8, 16, 3, 3))
    assert not np.isfinite(y[:, :, 9:12, 19:22]).any()
    touched = np.zeros((64, 64), bool)
    touched[8:12, 16:24] = True  # the tiles of 4 x 4 whose windows have it
    assert np.isfinite(y[:, :, ~touched]).all()


@needs_library
def test_one_session_is_used_by_many_threads_with_pictures_of_many_sizes():
    weights = floats(16, 16, 3, 3)
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="sdedit", pads=[1] * 4, strides=[1, 1], half=0)
    ran = session(model_of([node], {"w": weights}, {"x": floats(1, 1, 1, 1)}))
    pictures = [floats(1 + k % 3, 16, 4 + 9 * k, 60 - 5 * k) for k in range(12)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda x: ran.run(None, {"x": x})[0], pictures * 3))
    for x, y in zip(pictures * 3, made, strict=True):
        assert_close(y, expected(x, weights), 144)


REFUSED = {
    "x has 7 channels": {"x": floats(1, 7, 8, 8)},
    "x has three dimensions": {"x": floats(9, 8, 8)},
    "x is smaller than the kernel": {"x": floats(1, 9, 1, 1), "pads": (0, 0, 0, 0)},
    "a stride is 0": {"strides": (0, 0)},
    "a stride is negative": {"strides": (1, -1)},
    "there is one stride": {"strides": (1,)},
    "there is one pad": {"pads": (1,)},
    "there are no weights": {"x": floats(1, 0, 8, 8), "weights": floats(14, 0, 3, 3)},
    "a pad is negative": {"pads": (-1, 0, 0, 0)},
    "the bias is too short": {"bias": floats(3)},
    "what is added does not fit": {"add": floats(1, 14, 5, 8)},
    "what is added has five dimensions": {"add": floats(1, 1, 14, 8, 8)},
}


@needs_library
@pytest.mark.parametrize("wrong", REFUSED)
def test_what_does_not_fit_is_an_error_and_no_crash(wrong):
    given = {"x": floats(1, 9, 8, 8), "weights": floats(14, 9, 3, 3)} | REFUSED[wrong]
    with pytest.raises(Exception, match=r"Conv: |four dimensions"):
        convolved(**given)


@needs_library
@pytest.mark.parametrize(("ci", "co"), [(9, 5), (128, 128), (64, 200)])
def test_a_linear_layers_weights_are_those_of_one_pixel(unit, ci, co):
    x, weights, bias, add = floats(2, ci, 12, 20), floats(ci, co), floats(co), floats(2, co, 12, 20)
    as_kernel = np.ascontiguousarray(weights.T)[:, :, None, None]
    linear, kernel = (convolved(x, one, bias, add, NOTHING) for one in (weights, as_kernel))
    assert np.array_equal(linear, kernel)


# --- Conv in half precision ---------------------------------------------------------------------------------------

OWN = shipped.half() or "none"  # the half precision of this processor's best unit, which the engine uses
MOST = {
    "fp16": 1e-2,
    "bf16": 2.5e-2,
}  # error; rounding both factors makes 3e-4 and 2.3e-3, five times that in Winograd's

needs_half = pytest.mark.skipif(OWN == "none", reason="half precision is for AVX512-FP16 or AVX512-BF16")


@pytest.fixture(params=shipped.HALVES.items(), ids=shipped.HALVES.values())
def half(request):
    """The tests that use it run in each half precision of this processor."""
    yield from used(*request.param)


def error_of_half(half, x, weights, *given, **told) -> float:
    """Root mean square, as a part of the convolution's own and of what is allowed."""
    exact = expected(x, weights, *given, **told)
    own = expected(x, weights, **told)
    ours = convolved(x, weights, *given, **told, half=half)
    assert ours.shape == exact.shape
    return np.linalg.norm(ours - exact) / np.linalg.norm(own) / MOST[half]


@pytest.mark.parametrize(("n", "ci", "co", "h", "w"), SHAPES)
def test_a_convolution_in_half_precision_is_that_of_the_definition(half, n, ci, co, h, w):
    x, weights, bias = floats(n, ci, h, w), floats(co, ci, 3, 3), floats(co)
    assert 1e-3 < error_of_half(half, x, weights, bias) < 1


@pytest.mark.parametrize("ci", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 200, 513])
def test_every_number_of_channels_is_summed(half, ci):
    for size, kernel in ((32, 3), (8, 3), (8, 1)):
        x, weights = floats(1, ci, size, size), floats(7, ci, kernel, kernel)
        assert error_of_half(half, x, weights, pads=[kernel // 2] * 4) < 1


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 3), (4, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("pads", [NOTHING, (1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 3)])
def test_every_kernel_stride_and_padding_in_half_precision_is_that_of_the_definition(half, kernel, strides, pads):
    for channels in (9, 10):
        x, weights = floats(2, channels, 21, 38), floats(14, channels, *kernel)
        assert error_of_half(half, x, weights, pads=pads, strides=strides) < 1


@pytest.mark.parametrize("shape", ADDED)
def test_what_is_added_in_half_precision_is_added_in_float(half, shape):
    x, weights, bias, add = floats(2, 9, 24, 20), floats(14, 9, 3, 3), floats(14), floats(*shape)
    assert error_of_half(half, x, weights, 1e4 * bias, np.asarray(1e4 * add, np.float32)) < 1


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e4, 1e20])
@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_of_any_size_fit_into_halves(half, size, kernel):
    """Each channel of the result by itself: they are divided by a power of two, and it comes back in float."""
    x, weights = floats(1, 24, 32, 32), floats(6, 24, kernel, kernel)
    weights *= np.float32([1, size, size**0.5, 1, 0, 1 / size])[:, None, None, None]
    exact, ours = (f(x, weights, pads=[kernel // 2] * 4, **h) for f, h in ((expected, {}), (convolved, {"half": half})))
    sizes = np.linalg.norm(exact.reshape(6, -1), axis=1)
    apart = np.linalg.norm((ours - exact).astype(np.float64).reshape(6, -1), axis=1)
    assert (apart <= MOST[half] * sizes).all()


def test_what_is_too_large_for_halves_is_no_number(half):
    """A network that overflows says so; the engine refuses its result. bfloat16 has float32's range."""
    x, weights = 1e6 * floats(1, 16, 32, 32), floats(4, 16, 3, 3)
    if half == "fp16":
        assert not np.isfinite(convolved(x, weights, half=half)).any()
    else:
        assert error_of_half(half, x, weights) < 1


@pytest.mark.parametrize("side", [(36, 28), (8, 8), (16, 16), (12, 20), (3, 70)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_picture_in_half_precision_has_the_same_bits_alone_and_in_a_batch_by_any_number_of_threads(
    half, side, kernel
):
    x, weights, told = floats(5, 25, *side), floats(31, 25, kernel, kernel), {"pads": [kernel // 2] * 4, "half": half}
    batch = convolved(x, weights, **told)
    for number in range(5):
        assert np.array_equal(convolved(x[number : number + 1], weights, **told)[0], batch[number])
    assert np.array_equal(convolved(x, weights, threads=1, **told), batch)
    assert np.array_equal(convolved(x, weights, threads=5, **told), batch)


@needs_library
def test_a_vector_unit_without_a_half_precision_says_so(unit):
    has = next((shipped.HALVES.get(number) for number, name in shipped.UNITS.items() if name == unit), None)
    for one, said in (
        ("fp16", "in half precision it needs .* AVX512-FP16"),
        ("bf16", "in bfloat16 it needs .* and no"),
    ):
        if one != has:
            with pytest.raises(Exception, match=f"Conv: {said}"):
                convolved(floats(1, 8, 8, 8), floats(4, 8, 3, 3), half=one)


def test_a_linear_layers_weights_are_those_of_one_pixel_in_half_precision(half):
    x, weights = floats(2, 33, 12, 20), floats(33, 14) * np.float32(10) ** np.arange(-7, 7, dtype=np.float32)
    as_kernel = np.ascontiguousarray(weights.T)[:, :, None, None]
    linear, kernel = (convolved(x, one, pads=NOTHING, half=half) for one in (weights, as_kernel))
    assert np.array_equal(linear, kernel)


# --- GroupNorm ---------------------------------------------------------------------------------------------------


def normalised(x, scale, shift, groups, epsilon=1e-5, silu=0, then=()):
    inputs = {"x": x} | dict(zip(("modulation_scale", "modulation_shift"), then, strict=False))
    told = {"groups": groups, "epsilon": epsilon, "silu": silu}
    node = helper.make_node("GroupNorm", ["x", "scale", "shift", *list(inputs)[1:]], ["y"], domain="sdedit", **told)
    return session(model_of([node], {"scale": scale, "shift": shift}, inputs, rank=x.ndim)).run(None, inputs)[0]


def expected_norm(x, scale, shift, groups, epsilon=1e-5, silu=0, then=()):
    flat = x.astype(np.float64).reshape(len(x), groups, -1)
    y = (flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + epsilon)
    y = y.reshape(x.shape) * scale + shift
    y = y * then[0] + then[1] if then else y
    return y / (1 + np.exp(-y)) if silu else y


@needs_library
@pytest.mark.parametrize("silu", [0, 1])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 64, 64, 64), 32), ((2, 12, 5, 7), 3), ((1, 6, 1, 1), 6), ((3, 8, 33), 2), ((1, 4, 1, 9), 1)],
)
def test_a_group_norm_is_that_of_the_definition(unit, shape, groups, silu):
    x, channels = 3 * floats(*shape) + 5, (shape[1], *[1] * (len(shape) - 2))
    given = x, floats(*channels), floats(*channels), groups, 1e-5, silu
    exact = expected_norm(*given)
    assert np.abs(normalised(*given) - exact).max() <= 4e-6 * max(1, np.abs(exact).max())


@needs_library
@pytest.mark.parametrize("then", [((2, 12, 1, 1),) * 2, ((1, 12, 1, 1), (2, 1, 1, 1)), ((1, 1, 1, 1),) * 2])
def test_a_modulation_is_repeated_as_onnx_says(unit, then):
    given = floats(2, 12, 5, 7), floats(12, 1, 1), floats(12, 1, 1), 3, 1e-5, 1, [floats(*shape) for shape in then]
    assert np.abs(normalised(*given) - expected_norm(*given)).max() <= 1e-5


@needs_library
def test_a_group_without_contrast_is_its_shift(unit):
    x = np.full((1, 4, 40, 40), 1234.5, np.float32)
    assert np.array_equal(
        normalised(x, floats(4, 1, 1), np.float32([[[1]], [[2]], [[3]], [[4]]]), 2)[0, :, 0, 0], [1, 2, 3, 4]
    )


@needs_library
def test_a_large_mean_does_not_drown_the_contrast(unit):
    x = floats(1, 4, 64, 64) + np.float32(1000)
    given = x, np.ones((4, 1, 1), np.float32), np.zeros((4, 1, 1), np.float32), 2
    assert np.abs(normalised(*given) - expected_norm(*given)).max() <= 1e-3


@needs_library
@pytest.mark.parametrize("value", [-1e4, -100, -88, -87, -20, -1e-3, 0, 1e-3, 20, 87, 88, 100, 1e4, np.inf])
def test_silu_holds_over_the_whole_range(unit, value):
    x = np.float32([1, -1] * 50).reshape(1, 1, 100)  # its own norm, but for the scale
    ours = normalised(x, np.float32([[0]]), np.float32([[value]]), 1, 1e-12, 1)
    with np.errstate(all="ignore"):
        exact = value / (1 + np.exp(-np.float64(value)))
    assert np.allclose(ours, exact, rtol=2e-6, atol=1e-33)


@needs_library
@pytest.mark.parametrize(
    ("x", "scale"),
    [(floats(1, 7, 4, 4), floats(7, 1, 1)), (floats(1, 8, 16), floats(8, 1, 1)), (floats(1, 8, 4, 4), floats(4, 1, 1))],
)
def test_a_norm_that_does_not_fit_is_an_error_and_no_crash(x, scale):
    with pytest.raises(Exception, match="GroupNorm: "):
        normalised(x, scale, scale, 4)


# --- Attention ---------------------------------------------------------------------------------------------------


def attended(q, k, v, scale=1.0, keys_are_rows=1, values_are_rows=1, heads_inside=0, factors=(), heads=0):
    told = {"scale": scale, "keys_are_rows": keys_are_rows, "values_are_rows": values_are_rows}
    inputs = {"q": q, "k": k, "v": v} | {f"f{n}": factor for n, factor in enumerate(factors) if factor is not None}
    names = ["q", "k", "v", *(f"f{n}" if factor is not None else "" for n, factor in enumerate(factors))]
    node = helper.make_node("Attention", names, ["y"], domain="sdedit", heads_inside=heads_inside, heads=heads, **told)
    return session(model_of([node], {}, inputs, rank=q.ndim)).run(None, inputs)[0]


def expected_attention(q, k, v, scale=1.0, keys_are_rows=1, values_are_rows=1):
    q, k, v = (one.astype(np.float64) for one in (q, k, v))
    scores = scale * q @ (np.swapaxes(k, -1, -2) if keys_are_rows else k)
    parts = np.exp(scores - scores.max(-1, keepdims=True))
    return parts / parts.sum(-1, keepdims=True) @ (v if values_are_rows else np.swapaxes(v, -1, -2))


@needs_library
@pytest.mark.parametrize("keys_are_rows", [0, 1])
@pytest.mark.parametrize("values_are_rows", [0, 1])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "depth", "values"),
    [
        ((1, 16), 256, 256, 8, 8),
        ((2, 3), 64, 64, 32, 32),
        ((5,), 1, 77, 40, 13),
        ((), 33, 5, 1, 1),
        ((2, 1), 100, 1, 7, 30),
    ],
)
def test_attention_is_that_of_the_definition(unit, heads, queries, keys, depth, values, keys_are_rows, values_are_rows):
    q = floats(*heads, queries, depth)
    k = floats(*heads, *((keys, depth) if keys_are_rows else (depth, keys)))
    v = floats(*heads, *((keys, values) if values_are_rows else (values, keys)))
    given = q, k, v, depth**-0.5, keys_are_rows, values_are_rows
    assert np.abs(attended(*given) - expected_attention(*given)).max() <= 3e-6


@needs_library
@pytest.mark.parametrize(
    ("n", "heads", "queries", "keys", "depth", "values"), [(3, 5, 40, 70, 8, 9), (1, 1, 64, 64, 80, 80)]
)
def test_heads_may_lie_inside(unit, n, heads, queries, keys, depth, values):
    q, k, v = floats(n, queries, heads, depth), floats(n, keys, heads, depth), floats(n, keys, heads, values)
    exact = expected_attention(*(one.swapaxes(1, 2) for one in (q, k, v)), 0.3).swapaxes(1, 2)
    ours = attended(q, k, v, 0.3, heads_inside=1)
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= 3e-6


@needs_library
@pytest.mark.parametrize(("n", "heads", "depth", "values"), [(3, 5, 8, 9), (1, 1, 80, 80), (2, 16, 8, 8)])
@pytest.mark.parametrize(("queries", "keys"), [((5, 9), (5, 14)), ((8, 8), (8, 8)), ((70,), (33,)), ((1, 1), (2, 1))])
def test_rows_may_be_pixels(unit, n, heads, depth, values, queries, keys):
    q, k, v = floats(n, heads * depth, *queries), floats(n, heads * depth, *keys), floats(n, heads * values, *keys)
    rows = (one.reshape(n, heads, one.shape[1] // heads, -1).swapaxes(2, 3) for one in (q, k, v))
    exact = expected_attention(*rows, 0.3).swapaxes(2, 3).reshape(n, heads * values, *queries)
    ours = attended(q, k, v, 0.3, heads=heads)
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= 3e-6


@needs_library
@pytest.mark.parametrize("factors", [(0.5, 0.25), (None, 0.25), (0.5,)])
def test_factors_multiply_the_scale(factors):
    q, k, v = floats(2, 40, 16), floats(2, 50, 16), floats(2, 50, 8)
    product = np.prod([1 if factor is None else factor for factor in factors])
    given = [None if factor is None else np.float32([factor]) for factor in factors]
    assert np.abs(attended(q, k, v, 2.0, factors=given) - expected_attention(q, k, v, 2 * product)).max() <= 3e-6


@needs_library
def test_large_scores_are_as_exact_as_small_ones(unit):
    q, k, v = 30 * floats(1, 40, 16), 30 * floats(1, 50, 16), floats(1, 50, 8)
    assert np.abs(attended(q, k, v) - expected_attention(q, k, v)).max() <= 2e-3  # of scores near 4,000


@needs_library
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7FE00123, 0x7FFFFFFF])
def test_attention_to_what_is_no_number_is_no_number(unit, bits):
    q, k, v = floats(1, 40, 16), floats(1, 50, 16), floats(1, 50, 8)
    q.view(np.uint32)[0, 3, 0] = bits
    y = attended(q, k, v)
    assert np.isnan(y[0, 3]).all()
    assert np.isfinite(np.delete(y, 3, axis=1)).all()


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [
        {"k": floats(2, 50, 15)},
        {"v": floats(2, 49, 8)},
        {"v": floats(1, 50, 8)},
        {"k": floats(50, 16)},
        {"factors": [floats(2)]},
        {"heads_inside": 1},
        {"heads_inside": 1, "keys_are_rows": 0},
        {"heads_inside": 1, "q": floats(2, 3, 4, 5), "k": floats(2, 3, 5, 5), "v": floats(2, 3, 5, 5)},
        {"heads_inside": 1, "q": floats(2, 3, 4, 5), "k": floats(1, 3, 4, 5), "v": floats(1, 3, 4, 5)},
        {"heads": -1},
        {"heads": 3},
        {"heads": 5},
        {"heads": 5, "k": floats(2, 40, 16), "keys_are_rows": 0},
        {"heads": 5, "k": floats(2, 40, 16), "heads_inside": 1},
        {"heads": 4, "k": floats(2, 36, 16), "v": floats(2, 40, 16)},
        {"heads": 4, "k": floats(2, 40, 16), "v": floats(2, 40, 17)},
        {"heads": 4, "k": floats(1, 40, 16), "v": floats(1, 40, 16)},
        {"heads": 4, "k": floats(2, 40, 16), "v": floats(2, 42, 16)},
        {"heads": 2, "q": floats(40, 16), "k": floats(40, 16), "v": floats(40, 16)},
    ],
)
def test_attention_that_does_not_fit_is_an_error_and_no_crash(wrong):
    with pytest.raises(Exception, match="Attention: "):
        attended(**{"q": floats(2, 40, 16), "k": floats(2, 50, 16), "v": floats(2, 50, 8), **wrong})


# --- what they stand in for --------------------------------------------------------------------------------------


class Net:
    """Nodes one after another, from "x" on: each call adds one and is the name of what it makes."""

    def __init__(self, **constants: np.ndarray) -> None:
        self.nodes, self.constants = [], constants

    def __call__(self, operator: str, *inputs: str | np.ndarray, domain: str = "", **attributes) -> str:
        names = []
        for given in inputs:
            if not isinstance(given, str):
                self.constants[f"c{len(self.constants)}"] = np.asarray(given)
                given = list(self.constants)[-1]
            names.append(given)
        self.nodes.append(helper.make_node(operator, names, [f"n{len(self.nodes)}"], domain=domain, **attributes))
        return self.nodes[-1].output[0]

    def conv(self, x: str, ci: int = 8, co: int = 8, **attributes) -> str:
        told = {"pads": [1, 1, 1, 1], "strides": [1, 1]} | attributes
        return self("Conv", x, floats(co, ci, 3, 3) / np.float32(3 * ci**0.5), floats(co), **told)

    def norm(self, x: str, channels: int = 8, groups: int = 2, flat=None, ones=1, zeros=0, epsilon=1e-5) -> str:
        grouped = self("Reshape", x, np.int64([0, groups, -1] if flat is None else flat))
        plain = np.full(groups, ones, np.float32), np.full(groups, zeros, np.float32)
        normal = self("InstanceNormalization", grouped, *plain, epsilon=epsilon)
        back = self("Reshape", normal, self("Shape", x))
        return self("Add", self("Mul", back, floats(channels, 1, 1)), floats(channels, 1, 1))

    def silu(self, x: str, alpha: float = 1.0) -> str:
        return self("QuickGelu", x, domain="com.microsoft", alpha=alpha)

    def fused(self, y: str, x: np.ndarray | None = None, **inputs: np.ndarray) -> list[str]:
        """Which operators there are after `fuse`, which changes no result."""
        inputs = {"x": floats(2, 8, 12, 20) if x is None else x, **inputs}
        model = model_of(self.nodes, self.constants, inputs, y)
        written = fuse(model.SerializeToString())
        after = onnx.load_model_from_string(written or model.SerializeToString())
        onnx.checker.check_model(after)
        if written is not None:
            before, now = (session(one, optimised=False).run(None, inputs)[0] for one in (model, written))
            assert np.abs(before - now).max() <= 2e-5 * max(1, np.abs(before).max())
        return [node.op_type for node in after.graph.node if node.domain == "sdedit"]

    def left(self, y: str, **inputs: np.ndarray) -> list[str]:
        """Which of the others there are."""
        model = model_of(self.nodes, self.constants, {"x": floats(2, 8, 12, 20), **inputs}, y)
        after = onnx.load_model_from_string(fuse(model.SerializeToString()))
        return [node.op_type for node in after.graph.node if node.domain != "sdedit"]


@needs_library
def test_a_residual_block_becomes_four_operators():
    net = Net()
    told = net("Gemm", "embedding", floats(6, 8), floats(8))
    level = net("Unsqueeze", net("Unsqueeze", told, np.int64([2])), np.int64([3]))
    inner = net("Add", net.conv(net.silu(net.norm("x"))), level)
    y = net("Add", "x", net.conv(net.silu(net.norm(inner))))
    assert net.fused(y, embedding=floats(2, 6)) == ["GroupNorm", "Conv"] * 2
    assert net.left(y, embedding=floats(2, 6)) == ["Gemm", "Unsqueeze", "Unsqueeze"]


@needs_library
def test_a_modulated_norm_is_one_operator():
    net = Net()
    told = net("Gemm", "embedding", floats(6, 16), floats(16))
    both = net("Unsqueeze", net("Unsqueeze", told, np.int64([2])), np.int64([3]))
    scale = net("Add", net("Slice", both, np.int64([0]), np.int64([8]), np.int64([1])), np.float32(1))
    shift = net("Slice", both, np.int64([8]), np.int64([16]), np.int64([1]))
    y = net.silu(net("Add", net("Mul", net.norm("x"), scale), shift))
    assert net.fused(y, embedding=floats(2, 6)) == ["GroupNorm"]


@needs_library
def test_a_modulation_by_pixels_stays():
    net = Net()
    y = net("Add", net("Mul", net.norm("x"), "gate"), "more")
    assert net.fused(y, gate=floats(2, 8, 12, 20), more=floats(2, 8, 12, 20)) == ["GroupNorm"]
    assert net.left(y, gate=floats(2, 8, 12, 20), more=floats(2, 8, 12, 20)) == ["Mul", "Add"]


@needs_library
@pytest.mark.parametrize(
    "told",
    [
        {"ones": 2},
        {"zeros": 1},
        {"flat": [2, 2, -1]},
        {"flat": [0, 2, 8 * 120 // 2]},
        {"groups": 4, "flat": [1, 4, -1]},
    ],
)
def test_a_norm_that_is_another_stays(told):
    net = Net()
    y = net.norm("x", **told)
    assert (
        net.fused(
            y,
            x=floats(
                1 if told.get("flat", [0])[0] == 1 else 2,
                8,
                12,
                10 if len(told.get("flat", [])) > 2 and told["flat"][2] > 0 else 20,
            ),
        )
        == []
    )


ATTENTIONS = {  # how ONNX Runtime's optimiser writes it
    "two products": ({}, {}),
    "values in columns": ({}, {"transB": 1}),
    "keys in rows, scaled": ({"transB": 1, "alpha": 0.25}, {"transB": 0, "alpha": 1.0}),
}


def attention(first: dict, second: dict, **softmax) -> tuple[Net, str]:
    """Of x with itself: each picture's rows are queries, keys and values."""
    net = Net()
    keys = "x" if first.get("transB") else net("Transpose", "x", perm=[0, 1, 3, 2])
    values = net("Transpose", "x", perm=[0, 1, 3, 2]) if second.get("transB") else "x"

    def product(a: str, b: str, told: dict) -> str:
        return net("FusedMatMul", a, b, domain="com.microsoft", **told) if told else net("MatMul", a, b)

    return net, product(net("Softmax", product("x", keys, first), **{"axis": -1} | softmax), values, second)


@needs_library
@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_is_one_operator(form):
    net, y = attention(*ATTENTIONS[form])
    assert net.fused(y) == ["Attention"]
    assert set(net.left(y)) <= {"Transpose"}


def attention_of_heads(q_out=(0, 2, 1, 3), back=(0, 2, 1, 3), factor="Sqrt", rows=False, roots=1) -> tuple[Net, str]:
    """Of x (n, rows, heads, columns) with itself, as PyTorch writes it. rows: keys are rows of the product."""
    net = Net()
    root = net(factor, np.float32([0.25] * roots))
    q = net("Mul", net("Transpose", "x", perm=q_out), root)
    k = net("Mul", net("Transpose", "x", perm=(0, 2, 1, 3) if rows else (0, 2, 3, 1)), root)
    v = net("Transpose", "x", perm=(0, 2, 1, 3))
    scores = net("FusedMatMul", q, k, domain="com.microsoft", transB=1) if rows else net("MatMul", q, k)
    return net, net("Transpose", net("MatMul", net("Softmax", scores, axis=-1), v), perm=back)


@needs_library
@pytest.mark.parametrize("rows", [False, True])
def test_attention_takes_the_transpositions_and_roots_around_it(rows):
    net, y = attention_of_heads(rows=rows)
    assert net.fused(y, floats(2, 30, 8, 8)) == ["Attention"]
    assert net.left(y) == ["Sqrt"]


@needs_library
@pytest.mark.parametrize("other", [{"q_out": (2, 0, 1, 3)}, {"back": (2, 0, 1, 3)}, {"factor": "Abs"}, {"roots": 8}])
def test_transpositions_that_are_others_stay(other):
    net, y = attention_of_heads(**other)
    assert net.fused(y, floats(8, 8, 8, 8)) == ["Attention"]
    assert net.left(y).count("Transpose") == 4


def attention_of_pixels(
    heads=2, transposed=True, residual=True, back=(0, 2, 1), sides=(2, 3), order=(0, 2, 1, 3), again=None
) -> tuple[Net, str]:
    """Of the pixels of x (n, 8, h, w) between themselves, as PyTorch writes diffusers' attention."""
    net = Net()
    flat = net("Reshape", "x", np.int64([0, 0, -1]))
    grouped = net("Reshape", flat, np.int64([0, 2, -1]))
    normal = net("InstanceNormalization", grouped, np.ones(2, np.float32), np.zeros(2, np.float32))
    scaled = net("Mul", net("Reshape", normal, net("Shape", flat)), floats(8, 1))
    x = net("Add", scaled, floats(8, 1))
    shape = net("Shape", net("Transpose", flat, perm=(0, 2, 1)))
    batch = net("Unsqueeze", net("Gather", shape, np.int64(0)), np.int64([0]))

    def layer(rows: str) -> str:
        weights = floats(8, 8) / np.float32(3)
        if rows == x and transposed:
            product = net("FusedMatMul", x, weights, domain="com.microsoft", transA=1)
        else:
            product = net("MatMul", net("Transpose", x, perm=(0, 2, 1)) if rows == x else rows, weights)
        return net("Add", floats(8), product)

    q, k, v = layer(x), layer(x), layer(x)
    columns = net("Div", net("Gather", net("Shape", k), np.int64(2)), np.int64(heads))
    minus, held = np.int64([-1]), np.int64([heads])
    sizes = net("Concat", batch, minus, held, net("Unsqueeze", columns, np.int64([0])), axis=0)
    rows_of_k = k
    q, k, v = (net("Reshape", one, sizes) for one in (q, k, v))
    last = net("Slice", net("Gather", net("Shape", q), np.int64(order)), np.int64([-1]), np.int64([9]))
    root = net("Sqrt", net("Div", np.float32([1]), net("Sqrt", net("Cast", last, to=1))))
    q, v = net("Mul", net("Transpose", q, perm=(0, 2, 1, 3)), root), net("Transpose", v, perm=(0, 2, 1, 3))
    scores = net("MatMul", q, net("Mul", net("Transpose", k, perm=(0, 2, 3, 1)), root))
    rows = net("Transpose", net("MatMul", net("Softmax", scores, axis=-1), v), perm=(0, 2, 1, 3))
    width = net("Unsqueeze", net("Mul", columns, np.int64(heads)), np.int64([0]))
    rows = net("Reshape", rows, net("Concat", batch, minus, width, axis=0))
    parts = [net("Gather", net("Shape", "x"), np.int64([n])) for n in (1, *sides)]
    y = net("Reshape", net("Transpose", layer(rows), perm=back), net("Concat", batch, *parts, axis=0))
    y = net("Add", y, "x") if residual else y
    used = {
        "norm": lambda: x,
        "norm, by a layer": lambda: layer(x),
        "rows": lambda: rows_of_k,
        "rows, divided": lambda: k,
        "number of rows": lambda: net("Cast", net("Gather", net("Shape", rows_of_k), np.int64([1])), to=1),
        None: None,
    }[again]
    return net, y if used is None else net("Add", y, net("ReduceSum", used(), keepdims=0))


@needs_library
@pytest.mark.parametrize(
    "told",
    [{}, {"heads": 1}, {"heads": 8}, {"transposed": False}, {"residual": False}, {"residual": False, "heads": 4}],
)
@pytest.mark.parametrize("shape", [(2, 8, 12, 20), (1, 8, 4, 4)])
def test_attention_of_pixels_needs_no_transposition(told, shape):
    net, y = attention_of_pixels(**told)
    assert net.fused(y, floats(*shape)) == ["GroupNorm", "Conv", "Conv", "Conv", "Attention", "Conv"]
    assert net.left(y) == []


@needs_library
@pytest.mark.parametrize(
    "told",
    [
        *({"again": one} for one in ("norm", "norm, by a layer", "rows", "rows, divided", "number of rows")),
        {"back": (2, 1, 0)},
        {"sides": (3, 2)},
        {"order": (0, 2, 3, 1)},
    ],
)
def test_attention_of_pixels_that_is_another_keeps_its_rows(told):
    net, y = attention_of_pixels(**told)
    assert net.fused(y, floats(2, 8, 4, 4)) == ["GroupNorm", "Attention"]
    assert net.fused(y, floats(2, 8, 12, 12)) == ["GroupNorm", "Attention"]


@needs_library
@pytest.mark.parametrize(
    ("first", "second", "softmax"),
    [({}, {}, {"axis": 2}), ({"transA": 1, "transB": 0}, {}, {}), ({}, {"alpha": 2.0}, {})],
)
def test_attention_that_is_another_stays(first, second, softmax):
    net, y = attention(first, second, **softmax)
    square = floats(1, 2, 12, 12)
    assert net.fused(y, square) == []


@needs_library
def test_attention_with_a_mask_stays():
    net = Net()
    scores = net("Add", net("MatMul", "x", net("Transpose", "x", perm=[0, 1, 3, 2])), "mask")
    assert net.fused(net("MatMul", net("Softmax", scores, axis=-1), "x"), mask=floats(12, 12)) == []


@needs_library
def test_what_is_used_twice_is_still_there():
    net = Net()
    made = net.conv("x")
    y = net("Add", net("Add", made, "x"), net("Relu", made))
    assert net.fused(y) == ["Conv"]
    net = Net()
    made = net.norm("x")
    y = net("Add", net.silu(made), made)
    assert net.fused(y) == ["GroupNorm"]
    net = Net()
    made = net.conv("x")
    assert net.fused(net("Add", made, made)) == ["Conv"]


@needs_library
def test_what_the_graph_gives_back_is_still_there():
    net = Net()
    made = net.conv("x")
    net("Add", made, "x")
    assert net.fused(made) == ["Conv"]


@needs_library
def test_another_gelu_stays():
    net = Net()
    y = net.silu(net.norm("x"), alpha=1.702)
    assert net.fused(y) == ["GroupNorm"]
    assert net.left(y) == ["QuickGelu"]


@needs_library
@pytest.mark.parametrize(
    "told",
    [
        {"ci": 4, "group": 2},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_a_convolution_that_is_another_stays(told):
    net = Net()
    y = net("Conv", "x", floats(8, 8, 3, 3), **told) if "auto_pad" in told else net.conv("x", **told)
    assert net.fused(y) == []


@needs_library
def test_weights_that_are_computed_stay():
    net = Net()
    y = net("Conv", "x", net("Mul", floats(8, 8, 3, 3), np.float32(2)), pads=[1, 1, 1, 1])
    assert net.fused(y) == []


@needs_library
def test_attributes_that_are_left_out_are_onnxs_defaults():
    net = Net()
    assert net.fused(net("Conv", "x", floats(4, 8, 3, 3))) == ["Conv"]


@needs_library
def test_a_graph_with_graphs_inside_is_left_alone():
    then, other = (
        helper.make_graph([helper.make_node(op, ["n0"], ["z"])], op, [], [helper.make_tensor_value_info("z", 1, None)])
        for op in ("Neg", "Abs")
    )
    net = Net()
    made = net.conv("x")
    y = net(
        "If", net("Greater", net("ReduceMean", made, keepdims=0), np.float32(0)), then_branch=then, else_branch=other
    )
    assert net.fused(y) == []


# --- in an edit --------------------------------------------------------------------------------------------------


@pytest.fixture
def weighty(tmp_path) -> Path:
    """An artifact of 2 MB: convolutions, a norm and SiLU. It does not look at the noise level."""
    net = Net()
    inner = net.norm(net.conv("x", 3, 240), 240, 8)
    inner = net("Mul", inner, net("Sigmoid", inner))
    inner = net.conv(inner, 240, 240)
    net("Mul", net.conv(inner, 240, 3), np.float32(0.5))
    net.nodes[-1].output[0] = "denoised"
    return save(
        tmp_path / "weighty.onnx", net.nodes, net.constants, metadata((3, 16, 24), SDES["vp"]), shape=(3, 16, 24)
    )


GUIDE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def edited(model: Path, precision=None, **options) -> np.ndarray:
    editor = sdedit.load(model, backend="ort-cpu", threads=2, precision=precision)
    return editor.edit(GUIDE, steps=3, seed=1, **options).x


@needs_library
def test_an_edit_with_the_operators_is_the_edit_without_them(weighty, monkeypatch):
    ours = edited(weighty)
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    theirs = edited(weighty)
    assert not np.array_equal(ours, theirs)  # or they were not used
    assert np.abs(ours - theirs).max() <= 1e-5


@needs_half
def test_an_edit_in_half_precision_is_nearly_the_edit(weighty):
    wanted, editor = edited(weighty), sdedit.load(weighty, backend="ort-cpu", threads=2, precision=OWN)
    assert editor.backend.precision == OWN
    ours = editor.edit(GUIDE, steps=3, seed=1)
    assert 1e-5 < np.linalg.norm(ours.x - wanted) / np.linalg.norm(wanted) < MOST[OWN]
    told = record.make(editor, ours, 0)
    assert (told["backend"]["name"], told["backend"]["precision"]) == ("ort-cpu", OWN)
    assert told["versions"]["operators"] == shipped.version()


@needs_half
def test_the_graph_cache_keeps_both_precisions(weighty, tmp_path, monkeypatch):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    made = {p: [edited(weighty, precision=p) for _ in range(2)] for p in ("fp32", OWN, None)}
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 2
    assert all(np.array_equal(first, again) for first, again in made.values())
    assert np.array_equal(made["fp32"][0], made[None][0])
    assert not np.array_equal(made[OWN][0], made[None][0])


@pytest.mark.parametrize("half", [None, "fp16", "bf16"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, 100])
@pytest.mark.parametrize("picture", [0, 1])
def test_graphs_agree_only_where_both_pictures_do(half, wrong, picture):
    x, wanted = floats(2, 3, 8, 8), floats(2, 3, 8, 8)
    assert ort_graph._agree(x, wanted, wanted, "fp32", half)
    found = wanted.copy()
    found[picture, 0, 0, 0] = wrong
    assert not ort_graph._agree(x, wanted, found, "fp32", half)


@needs_half
def test_half_precision_is_refused_where_there_is_none(weighty, network, monkeypatch):
    with pytest.raises(sdedit.BackendUnavailable, match="and ort-cpu runs it in fp32 alone"):
        sdedit.load(network, backend="ort-cpu", precision=OWN)  # too small
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    with pytest.raises(sdedit.BackendUnavailable, match="and ort-cpu runs it in fp32 alone"):
        sdedit.load(weighty, backend="ort-cpu", precision=OWN)


@needs_half
def test_half_precision_is_refused_where_nothing_can_be_computed_in_it(tmp_path):
    net = Net(weights=floats(300_000))
    net("Mul", "x", np.float32(0.5))
    net.nodes[-1].output[0] = "denoised"
    path = save(tmp_path / "net.onnx", net.nodes, net.constants, metadata((3, 16, 24), SDES["vp"]), shape=(3, 16, 24))
    with pytest.raises(
        sdedit.BackendUnavailable, match=f"ort-cpu finds no way to run it in {OWN} that agrees with float32"
    ):
        sdedit.load(path, backend="ort-cpu", precision=OWN)


@pytest.mark.skipif(OWN != "fp16", reason="bfloat16 has float32's range")
def test_a_network_that_overflows_halves_is_refused_and_nothing_is_kept_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    net = Net()
    net("Mul", net.conv(net("Mul", net.conv("x", 3, 240), np.float32(1e6)), 240, 240), np.float32(1e-6))
    net.nodes[-1].output[0] = "n"
    net("Conv", "n", floats(3, 240, 1, 1))
    net.nodes[-1].output[0] = "denoised"
    path = save(tmp_path / "net.onnx", net.nodes, net.constants, metadata((3, 16, 24), SDES["vp"]), shape=(3, 16, 24))
    with pytest.raises(sdedit.BackendUnavailable, match="ort-cpu finds no way to run it in fp16"):
        sdedit.load(path, backend="ort-cpu", precision=OWN)
    assert list((tmp_path / "cache" / "graphs").iterdir()) == []


@pytest.fixture
def fails_once(monkeypatch, tmp_path):
    """fails_once() -> a block in which the operators cannot be had, with a graph cache for it and for what follows."""
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))

    def fails(*_, **__):
        raise MemoryError

    @contextmanager
    def block():
        with monkeypatch.context() as once:
            once.setattr(ort_cache, "open_fused", fails)
            yield

    return block


@needs_half
def test_a_failure_in_half_precision_that_passes_is_forgotten(weighty, fails_once):
    with fails_once(), pytest.raises(sdedit.BackendUnavailable):
        sdedit.load(weighty, backend="ort-cpu", precision=OWN)
    assert sdedit.load(weighty, backend="ort-cpu", precision=OWN).backend.precision == OWN


@needs_library
def test_a_failure_that_passes_is_told_and_forgotten(weighty, fails_once, caplog):
    with fails_once():
        assert "operators" not in sdedit.load(weighty, backend="ort-cpu").backend.versions
    assert "ort-cpu runs closed-form without this package's operators, more slowly: MemoryError" in caplog.text
    assert sdedit.load(weighty, backend="ort-cpu").backend.versions["operators"] == shipped.version()


@needs_half
def test_a_half_precision_that_does_not_agree_is_tried_once(weighty, monkeypatch, tmp_path):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    tried = []
    monkeypatch.setattr(ort_cache, "open_fused", lambda *_, **__: tried.append(1))
    with pytest.raises(sdedit.BackendUnavailable):
        sdedit.load(weighty, backend="ort-cpu", precision=OWN)
    assert len(tried) == 1


@needs_half
def test_the_fastest_execution_may_be_in_half_precision(weighty, caplog):
    caplog.set_level("INFO", "sdedit")
    editor = sdedit.load(weighty, backend="ort-cpu", fast=True)
    assert f"ort-cpu, {OWN} (weighty.onnx): " in caplog.text
    assert f"fast: ort-cpu, {editor.backend.precision} (weighty.onnx): " in caplog.text


@needs_library
def test_the_bundled_model_uses_them(monkeypatch):
    assert sdedit.load(backend="ort-cpu").backend.versions["operators"] == shipped.version()
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    assert "operators" not in sdedit.load(backend="ort-cpu").backend.versions


@needs_library
def test_a_record_says_which_operators_they_were(weighty):
    editor = sdedit.load(weighty, backend="ort-cpu")
    assert record.make(editor, editor.edit(GUIDE, steps=1), 0)["versions"]["operators"] == shipped.version()


@needs_library
@pytest.mark.parametrize("operators", ["on", "off"])
def test_a_replay_on_other_operators_says_so(operators, weighty, tmp_path, monkeypatch, capsys):
    Image.fromarray(GUIDE).save(tmp_path / "guide.png")
    guide, first, again = (str(tmp_path / name) for name in ("guide.png", "first.png", "again.png"))
    monkeypatch.setenv("SDEDIT_OPERATORS", operators)
    assert main(["edit", guide, "-m", str(weighty), "-o", first, "--steps", "1", "--backend", "ort-cpu"]) == 0
    monkeypatch.setenv("SDEDIT_OPERATORS", {"on": "off", "off": "on"}[operators])
    capsys.readouterr()
    assert main(["edit", "--replay", first, guide, "-m", str(weighty), "-o", again]) == 0
    had, has = (shipped.version(), "none") if operators == "on" else ("none", shipped.version())
    assert f"operators: {has} here, {had} in the record: the bytes may differ\n" in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize("cached", ["off", "on", "in a file's place"])
def test_the_bits_are_the_same_with_the_graph_cache_without_it_and_where_it_cannot_be(
    cached, weighty, tmp_path, monkeypatch
):
    wanted = edited(weighty)
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "off" if cached == "off" else "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    if cached == "in a file's place":
        (tmp_path / "cache").write_text("")
    assert np.array_equal(edited(weighty), wanted)
    assert np.array_equal(edited(weighty), wanted)


@needs_library
def test_every_picture_of_a_batch_has_the_bits_that_it_has_alone(weighty):
    editor = sdedit.load(weighty, backend="ort-cpu", threads=2)
    batch = editor.edit(GUIDE, steps=2, seed=3, samples=3, batch=3).x
    for number in range(3):
        assert np.array_equal(editor.edit(GUIDE, steps=2, seed=3 + number).x[0], batch[number])


@needs_library
def test_a_graph_that_gives_another_picture_is_not_used(weighty, monkeypatch):
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    wanted = edited(weighty)
    monkeypatch.setenv("SDEDIT_OPERATORS", "on")

    def wrong(model: bytes, *, half: str | None) -> bytes:
        graph = onnx.load_model_from_string(fuse(model, half=half))
        norm = next(node for node in graph.graph.node if node.op_type == "GroupNorm")
        next(one for one in norm.attribute if one.name == "epsilon").f = 0.5
        return graph.SerializeToString()

    monkeypatch.setattr(ort_graph, "fuse", wrong)
    editor = sdedit.load(weighty, backend="ort-cpu", threads=2)
    assert "operators" not in editor.backend.versions
    assert np.array_equal(editor.edit(GUIDE, steps=3, seed=1).x, wanted)


@needs_library
def test_a_graph_that_the_operators_do_not_take_is_not_used(weighty, monkeypatch):
    def wrong(model: bytes, *, half: str | None) -> bytes:
        graph = onnx.load_model_from_string(fuse(model, half=half))
        next(node for node in graph.graph.node if node.op_type == "GroupNorm").op_type = "Other"
        return graph.SerializeToString()

    monkeypatch.setattr(ort_graph, "fuse", wrong)
    assert "operators" not in sdedit.load(weighty, backend="ort-cpu").backend.versions


@needs_library
def test_a_network_that_repeats_what_it_attends_to_still_runs_in_batches(tmp_path):
    """Its keys are constants, the same for every picture, which ONNX's products repeat and the operator does not."""
    net = Net()
    x = net("Reshape", "x", np.int64([0, 3, 384]))
    scores = net("MatMul", net("Transpose", x, perm=[0, 2, 1]), floats(1, 3, 700))
    x = net("MatMul", net("Softmax", scores, axis=-1), floats(1, 700, 3))
    x = net("Reshape", net("Transpose", x, perm=[0, 2, 1]), np.int64([0, 3, 16, 24]))
    net("Add", net.conv(net.conv(x, 3, 240), 240, 3), np.float32(0))
    net.nodes[-1].output[0] = "denoised"
    net.constants["unused"] = floats(300_000)
    path = save(tmp_path / "net.onnx", net.nodes, net.constants, metadata((3, 16, 24), SDES["vp"]), shape=(3, 16, 24))
    editor = sdedit.load(path, backend="ort-cpu", threads=2)
    assert editor.edit(GUIDE, steps=1, samples=2, batch=2).x.shape == (2, 3, 16, 24)


@needs_library
def test_an_entry_of_the_graph_cache_belongs_to_one_library_of_operators(weighty, tmp_path, monkeypatch):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    for change in ({}, {"SDEDIT_OPERATORS": "off"}, {"SDEDIT_OPERATORS": "on"}):
        for name, value in change.items():
            monkeypatch.setenv(name, value)
        edited(weighty)
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 2
    monkeypatch.setattr(shipped, "version", lambda: "another")
    edited(weighty)
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 3


def test_another_value_of_the_variable_is_an_error(weighty, network, monkeypatch):
    monkeypatch.setenv("SDEDIT_OPERATORS", "yes")
    for model in (weighty, network):
        with pytest.raises(sdedit.OptionError, match=r"SDEDIT_OPERATORS is 'yes'"):
            sdedit.load(model, backend="ort-cpu")
    assert doctor.examine()["operators"] == "SDEDIT_OPERATORS is 'yes'; fix: set it to on or off, or not at all"


def test_doctor_says_what_computes_them(monkeypatch, capsys):
    assert main(["doctor"]) == 0
    assert f"operators of ort-cpu\n  {shipped.vector_unit()}\n" in capsys.readouterr().out
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    assert doctor.examine()["operators"] == (shipped.OFF if shipped._vector_unit() else shipped.NONE)


def test_where_the_library_does_not_load_onnx_runtime_does_it_all(weighty, tmp_path, monkeypatch):
    (tmp_path / "other.so").write_bytes(b"of another system")
    monkeypatch.setattr(shipped, "LIBRARY", tmp_path / "other.so")
    monkeypatch.setattr(shipped, "_vector_unit", shipped._vector_unit.__wrapped__)
    assert "operators" not in sdedit.load(weighty, backend="ort-cpu").backend.versions


def test_a_small_network_is_left_to_onnx_runtime(weighty, monkeypatch):
    monkeypatch.setattr(ort_cache, "LEAST_BYTES", 2**23)
    assert "operators" not in sdedit.load(weighty, backend="ort-cpu").backend.versions


# --- for other hosts ---------------------------------------------------------------------------------------------


@needs_library
def test_the_written_graph_makes_the_bits_of_the_backend(weighty, tmp_path):
    command = [sys.executable, "-m", "sdedit.operators.graph", weighty, "-o", tmp_path / "graph"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{tmp_path / 'graph'}\n"
    assert {path.name for path in (tmp_path / "graph").iterdir()} == {"graph.onnx", "graph.weights", "liboperators.so"}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(tmp_path / "graph" / "liboperators.so"))
    alone = onnxruntime.InferenceSession(tmp_path / "graph" / "graph.onnx", options, providers=["CPUExecutionProvider"])
    x, sigma = floats(2, 3, 16, 24), np.ones(2, np.float32)
    ours = sdedit.load(weighty, backend="ort-cpu", threads=2).backend.bind(2, {})(x, sigma)
    assert np.array_equal(alone.run(None, {"x": x, "sigma": sigma})[0], ours)


@needs_half
def test_the_written_graph_may_be_in_half_precision(weighty, tmp_path):
    graph.write(weighty, tmp_path / "graph", OWN)
    x, sigma = floats(2, 3, 16, 24), np.ones(2, np.float32)
    ours = sdedit.load(weighty, backend="ort-cpu", threads=2, precision=OWN).backend.bind(2, {})(x, sigma)
    alone = session((tmp_path / "graph" / "graph.onnx").as_posix(), optimised=False)
    assert np.array_equal(alone.run(None, {"x": x, "sigma": sigma})[0], ours)


@pytest.mark.parametrize(
    ("model", "folder", "said"),
    [
        ("nowhere.onnx", "graph", "nowhere.onnx: no such file"),
        ("weighty.onnx", "there", "there: exists already"),
        ("weighty.onnx", "nowhere/graph", "nowhere: no such folder"),
        ("plain.onnx", "graph", "plain.onnx: ort-cpu runs it here without this package's operators"),
    ],
)
def test_what_cannot_be_written_is_one_error_and_nothing_is_left(model, folder, said, weighty, negative, monkeypatch):
    monkeypatch.chdir(weighty.parent)
    shutil.copy(negative, "plain.onnx")
    Path("there").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises(sdedit.SdeditError, match=f"^{said}"):
        graph.write(Path(model), Path(folder))
    assert sorted(Path().rglob("*")) == before
