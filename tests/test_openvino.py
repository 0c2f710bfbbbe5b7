"""The openvino backend computes what ONNX Runtime computes, in the precision that was asked for."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from closed_form import SDES, metadata, save
from conftest import SHAPE
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import sdedit
from sdedit.backends import precisions
from sdedit.cli.main import main

pytest.importorskip("openvino", reason="needs the openvino extra")


@pytest.fixture(scope="session")
def wide(models):
    """D = conv(x/(1+σ)) without an edge: D at another size is D, and sums are long enough to tell precisions apart."""
    kernel = np.random.default_rng(2).normal(0, 0.3, (3, 3, 7, 7)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Add", ["s", "one"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel"], ["denoised"], pads=[3, 3, 3, 3]),
    ]
    weights = {"column": np.array([-1, 1, 1, 1], np.int64), "one": np.array(1, np.float32), "kernel": kernel}
    described = metadata(SHAPE, SDES["vp"])
    described["image"] |= {"dynamic": True, "multiple": 4}
    float32 = onnx.TensorProto.FLOAT
    free = {"x": (float32, ["B", 3, "H", "W"]), "sigma": (float32, ["B"])}
    outputs = {"denoised": (float32, ["B", 3, "H", "W"])}
    return save(models / "wide.onnx", nodes, weights, described, inputs=free, outputs=outputs)


def evaluated(path, backend, *, batch=1, size=None, precision=None, conditions=None):
    width, height = size or (SHAPE[2], SHAPE[1])
    x = np.random.default_rng(batch).standard_normal((batch, 3, height, width)).astype(np.float32)
    opened = sdedit.load(path, backend=backend, precision=precision, threads=1).backend
    return opened.bind(batch, conditions or {}, size)(x, np.linspace(0.5, 3, batch, dtype=np.float32)).copy()


def distance(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def reduced(path):
    return [p for p in precisions("openvino", sdedit.load(path, backend="ort-cpu").artifact) if p != "fp32"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [None, (24, 16)])
def test_it_is_the_same_function_as_onnx_runtime_in_every_batch_and_size(wide, batch, size):
    found, wanted = (evaluated(wide, name, batch=batch, size=size) for name in ("openvino", "ort-cpu"))
    assert found.shape == wanted.shape
    assert distance(found, wanted) < 1e-6  # bfloat16, which OpenVINO would take by itself, is a thousand times that


def test_a_reduced_precision_is_used_when_asked_for(wide):
    if not (able := reduced(wide)):
        pytest.skip("this CPU computes in float32 alone")
    wanted = evaluated(wide, "ort-cpu")
    for precision in able:
        assert 1e-5 < distance(evaluated(wide, "openvino", precision=precision), wanted) < 2e-2
        assert sdedit.load(wide, precision=precision).backend.name == "openvino"  # auto: nothing else can


@pytest.mark.parametrize("backend", ["auto", "openvino", "ort-cpu"])
def test_a_precision_that_nothing_executes_is_refused(wide, backend):
    with pytest.raises(sdedit.BackendUnavailable, match=r"int8 was asked for; closed-form is fp32, and \S+ runs it in"):
        sdedit.load(wide, backend=backend, precision="int8")


def test_a_class_label_reaches_the_network(labelled):
    for label in (0, 7):
        conditions = {"class_label": label}
        np.testing.assert_allclose(evaluated(labelled, "openvino", batch=2, conditions=conditions), label / 10, 1e-6)


def test_x_is_read_where_it_lies_and_a_wrong_one_is_refused(network):
    denoiser = sdedit.load(network, backend="openvino", threads=1).backend.bind(2, {})
    x, sigma = np.ones((2, *SHAPE), np.float32), np.ones(2, np.float32)
    before = denoiser(x, sigma).copy()
    x *= -1  # in place, as the loop does
    np.testing.assert_allclose(denoiser(x, sigma), -before, atol=1e-6)
    for wrong in (x[:1], x.astype(np.float64), x[..., ::-1]):
        with pytest.raises(sdedit.NetworkError, match="bound for contiguous float32"):
            denoiser(wrong, sigma)


def test_one_editor_serves_threads_that_edit_in_different_batches(network, picture):
    editor = sdedit.load(network, backend="openvino", threads=1)
    guides = [picture(12, 8, seed) for seed in range(3)]
    alone = editor.edit(guides, steps=3).x
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda batch: editor.edit(guides, steps=3, batch=batch).x, (1, 2, 3)))
    for found in together:
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_a_file_that_is_replaced_after_it_was_loaded_is_refused(network, negative, picture, tmp_path):
    path = Path(shutil.copy(network, tmp_path / "model.onnx"))
    editor = sdedit.load(path, backend="openvino", threads=1)
    wanted = editor.edit(picture(12, 8), steps=2).x
    shutil.copy(negative, tmp_path / "other.onnx")
    os.replace(tmp_path / "other.onnx", path)
    with pytest.raises(sdedit.ArtifactError, match=r"model\.onnx: was changed since it was read"):
        editor.edit(picture(12, 8), steps=2, batch=2)
    assert np.array_equal(editor.edit(picture(12, 8), steps=2).x, wanted)


def test_the_networks_of_a_few_shapes_are_kept(network, picture, monkeypatch):
    editor, compiled = sdedit.load(network, backend="openvino", threads=1), []
    monkeypatch.setattr(editor.backend, "_core", SimpleNamespace(
        read_model=editor.backend._core.read_model,
        compile_model=lambda *given, core=editor.backend._core: compiled.append(1) or core.compile_model(*given),
    ))  # fmt: skip
    for batch in (1, 2, 1, 3, 1, 4, 1, 5, 1):
        editor.edit(picture(12, 8), steps=1, batch=batch)
    assert len(compiled) == 4  # of 2 to 5: that of 1 was never the longest unused
    editor.edit(picture(12, 8), steps=1, batch=2)
    assert len(compiled) == 5


def test_weights_beside_the_file_are_found(network, tmp_path):
    path = tmp_path / "outside.onnx"
    onnx.save(onnx.load(network), path, save_as_external_data=True, location="outside.data", size_threshold=0)
    assert distance(evaluated(path, "openvino"), evaluated(network, "openvino")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_not_text_is_opened(network, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    shutil.copyfile(network, path)
    assert distance(evaluated(path, "openvino"), evaluated(network, "openvino")) == 0


def test_what_it_cannot_load_is_an_error_about_the_file(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "kernel"], ["denoised"], pads=[1, 1, 1, 1])]
    kernel = np.zeros((3, 5, 3, 3), np.float32)  # for five channels, not three
    path = save(tmp_path / "broken.onnx", nodes, {"kernel": kernel}, metadata(SHAPE, SDES["vp"]), shape=SHAPE)
    with pytest.raises(sdedit.ArtifactError, match=r"broken\.onnx: OpenVINO cannot load it: .") as raised:
        sdedit.load(path, backend="openvino")
    assert "Exception from" not in str(raised.value)


def test_an_output_of_another_shape_is_an_error_about_it(tmp_path):
    nodes = [helper.make_node("Constant", [], ["denoised"], value=numpy_helper.from_array(np.zeros((1,) * 4, "f4")))]
    unsaid = {"denoised": (TensorProto.FLOAT, ["B", "c", "h", "w"])}
    path = save(tmp_path / "one.onnx", nodes, {}, metadata(SHAPE, SDES["vp"]), shape=SHAPE, outputs=unsaid)
    with pytest.raises(sdedit.NetworkError, match=r"OpenVINO does not take float32 \(1, 3, 8, 12\) for denoised: ."):
        sdedit.load(path, backend="openvino").backend.bind(1, {})


def test_without_the_package_the_error_names_the_extra(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(sdedit.BackendUnavailable, match=r"^openvino: openvino cannot be imported") as raised:
        sdedit.load(network, backend="openvino")
    assert raised.value.hint == "pip install 'sdedit-engine[openvino]'"


def test_auto_takes_it_where_onnx_runtime_is_missing_and_asks_for_onnx_runtime_where_both_are(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert sdedit.load(network).backend.name == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(sdedit.BackendUnavailable, match=r"^ort-cpu: onnxruntime cannot be imported"):
        sdedit.load(network)


def test_an_edit_records_backend_and_precision_and_a_replay_repeats_them(wide, write_png, picture, tmp_path, capsys):
    precision = (*reduced(wide), "fp32")[0]
    guide, made, again = str(write_png("guide.png", picture(12, 8))), tmp_path / "made.png", tmp_path / "again.png"
    command = ["edit", guide, "-m", str(wide), "--steps", "3", "--threads", "1"]
    assert main([*command, "--backend", "openvino", "--precision", precision, "-o", str(made)]) == 0
    record = json.loads(Image.open(made).info["sdedit"])
    assert record["backend"] == {"name": "openvino", "precision": precision, "threads": 1}
    assert "openvino" in record["versions"]
    assert main(["edit", guide, "-m", str(wide), "--replay", str(made), "-o", str(again)]) == 0
    assert made.read_bytes() == again.read_bytes()


def test_verify_compares_with_it(network, capsys):
    assert main(["verify", str(network), "--backend", "ort-cpu", "--against", "openvino", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["backend"] == "openvino"
