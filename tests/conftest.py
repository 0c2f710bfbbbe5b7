"""Closed-form models with a small, wide frame, and pictures for them. Tests never need a trained network."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from closed_form import SDES, gaussian, metadata, save
from onnx import TensorProto, helper
from PIL import Image

import sdedit
from sdedit.capi import shipped

SHAPE = (3, 8, 12)  # channels, height, width: not square, so that swapped axes show
SMALL_NOISE = {"kind": "ve", "sigma_min": 1e-4, "sigma_max": 1.0}  # at t0 0.01 the noise is below one grey level

os.environ.setdefault("SDEDIT_GRAPH_CACHE", "off")  # no test leaves files in the home of whoever runs it

for name in ("SIGINT", "SIGHUP"):  # tests in the background of a script, or under nohup, inherit them ignored
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

Exact = Callable[[np.ndarray, np.ndarray], np.ndarray]
Picture = Callable[..., np.ndarray]
WritePng = Callable[[str, np.ndarray], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def paint(models: Path) -> Path:
    """A model whose every result is grey 204, whatever the guide and the noise."""
    return gaussian(models / "paint.onnx", SDES["vp"], np.full(SHAPE, 0.6), std=1e-4)[0]


@pytest.fixture(scope="session")
def negative(models: Path) -> Path:
    """A model that inverts what it sees, D = -x, on a schedule with hardly any noise near t = 0."""
    nodes = [helper.make_node("Neg", ["x"], ["denoised"])]
    return save(models / "negative.onnx", nodes, {}, metadata(SHAPE, SMALL_NOISE), shape=SHAPE)


@pytest.fixture(scope="session")
def textured(models: Path) -> tuple[Path, Exact]:
    """The posterior mean of a Gaussian around a textured picture, and the same in float64."""
    mean = np.random.default_rng(1).uniform(-0.5, 0.5, SHAPE)
    return gaussian(models / "textured.onnx", SDES["vp"], mean, std=0.5)


@pytest.fixture(scope="session")
def network(models: Path) -> Path:
    """D = tanh(conv(x/(1+σ))): every output depends on its neighbours and on all channels."""
    kernel = np.random.default_rng(2).normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Add", ["s", "one"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel"], ["mixed"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["mixed"], ["denoised"]),
    ]
    weights = {"column": np.array([-1, 1, 1, 1], np.int64), "one": np.array(1, np.float32), "kernel": kernel}
    return save(models / "network.onnx", nodes, weights, metadata(SHAPE, SDES["vp"]), shape=SHAPE)


@pytest.fixture(scope="session")
def labelled(models: Path) -> Path:
    """A model with a class label: every result of class k is grey 127.5 + 12.75 k."""
    nodes = [
        helper.make_node("Cast", ["class_label"], ["label"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["label", "tenth"], ["level"]),
        helper.make_node("Reshape", ["level", "column"], ["levels"]),
        helper.make_node("Mul", ["x", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "levels"], ["denoised"]),
    ]
    weights = {
        "column": np.array([-1, 1, 1, 1], np.int64),
        "tenth": np.array(0.1, np.float32),
        "zero": np.array(0, np.float32),
    }
    described = metadata(SHAPE, SDES["vp"], inputs={"class_label": {"dtype": "int64", "count": 10}})
    inputs = {
        "x": (TensorProto.FLOAT, ["B", *SHAPE]),
        "sigma": (TensorProto.FLOAT, ["B"]),
        "class_label": (TensorProto.INT64, ["B"]),
    }
    return save(models / "labelled.onnx", nodes, weights, described, shape=SHAPE, inputs=inputs)


@pytest.fixture(scope="session")
def editor(network: Path) -> sdedit.Editor:
    return sdedit.load(network, backend="ort-cpu", threads=1)


@pytest.fixture(params=shipped.MAKERS)
def each_noise_maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the noise of the shipped library, where that loads, and with NumPy's."""
    if request.param == shipped.COMPILED and shipped._load() is None:
        pytest.skip("the shipped library is for Linux on x86-64")
    monkeypatch.setenv(shipped.VARIABLE, request.param)
    return request.param


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(width, height, seed=0): random dark pixels, (height, width, 3) uint8 in 0 … 120."""

    def make(width: int, height: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 121, (height, width, 3), np.uint8)

    return make


@pytest.fixture
def write_png(tmp_path: Path) -> WritePng:
    """write_png("name.png", pixels) -> the file's path."""

    def write(name: str, pixels: np.ndarray) -> Path:
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write
