"""`sdedit export --triton REPO MODEL.plan`: the network of a plan for Triton's TensorRT backend.

There is no TensorRT and no server here: the plan is a file of a few bytes whose sidecar is whole. What is checked is
the folder, against the published schema, and what Triton's batcher and its backend ask of it.
"""

import hashlib
import json
from pathlib import Path

import pytest
from closed_form import SDES, metadata
from conftest import SHAPE
from google.protobuf import text_format
from triton_schema import MODEL_CONFIG, type_name

from sdedit.cli.main import main
from sdedit.export import triton, triton_plan
from sdedit.tensorrt import plan as plans

CONTENT = b"not an engine"


@pytest.fixture
def write_plan(tmp_path):
    """write_plan(library, batch, label) -> a plan on disk."""

    def write(library="tensorrt", batch=(1, 2, 8), *, label=False):
        described = metadata(SHAPE, SDES["vp"])
        inputs = [("x", "float32", ["B", *SHAPE]), ("sigma", "float32", ["B"])]
        if label:
            described["inputs"] = {"class_label": {"dtype": "int64", "count": 10}}
            inputs.append(("class_label", "int64", ["B"]))
        sidecar = {
            "format": 1,
            "artifact": {"name": "closed-form", "sha256": "0" * 64, "size": 1, "opset": 18},
            "library": {"name": library, "version": "10.16.1"},
            "gpu": None,
            "targets": ["sm_90"],
            "profile": {"batch": list(batch), "shapes": {}},
            "precision": "fp32",
            "metadata": described,
            "inputs": [dict(zip(("name", "dtype", "shape"), one, strict=True)) for one in inputs],
            "outputs": [{"name": "denoised", "dtype": "float32", "shape": ["B", *SHAPE]}],
            "plan": {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()},
            "flags": {},
        }
        path = tmp_path / "model.plan"
        plans.write(path, CONTENT, sidecar)
        return path

    return write


def config_of(folder: Path):
    """What Triton reads, with what it checks when it loads a model of the TensorRT backend."""
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), MODEL_CONFIG())
    assert config.name == folder.name
    assert config.platform == "tensorrt_plan"
    assert config.backend == ""  # one of the two
    for one in (*config.input, *config.output):
        assert len(one.dims) >= 1
        assert not one.HasField("reshape") or (list(one.dims), list(one.reshape.shape)) == ([1], [])
    for sample in config.model_warmup:
        assert set(sample.inputs) == {one.name for one in config.input}
        assert 1 <= sample.batch_size <= config.max_batch_size
        for one in config.input:
            assert list(sample.inputs[one.name].dims) == list(one.dims)
            assert sample.inputs[one.name].data_type == one.data_type
    return config


def export(capsys, tmp_path, *words):
    code = main(["export", "--triton", str(tmp_path / "models"), *map(str, words)])
    return code, capsys.readouterr()


def test_the_folder_holds_the_plan_and_this_configuration(write_plan, tmp_path, capsys):
    code, said = export(capsys, tmp_path, write_plan())
    folder = tmp_path / "models" / "closed-form"
    assert (code, said.out) == (0, f"{folder}\n")
    assert said.err == "the network of closed-form: TensorRT 10.16.1, sm_90, batch 1:8\n"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["1/model.plan", "config.pbtxt"]
    assert (folder / "1" / "model.plan").read_bytes() == CONTENT
    config = config_of(folder)
    assert text_format.MessageToString(config, as_one_line=True).startswith(
        'name: "closed-form" platform: "tensorrt_plan" max_batch_size: 8 '
        'input { name: "x" data_type: TYPE_FP32 dims: 3 dims: 8 dims: 12 } '
        'input { name: "sigma" data_type: TYPE_FP32 dims: 1 reshape { } } '
        'output { name: "denoised" data_type: TYPE_FP32 dims: 3 dims: 8 dims: 12 } '
        "instance_group { count: 1 kind: KIND_GPU } "
        "dynamic_batching { preferred_batch_size: 2 preferred_batch_size: 8 max_queue_delay_microseconds: 200 } "
        'parameters { key: "sdedit_plan" '
    )
    assert [(one.name, one.batch_size) for one in config.model_warmup] == [("batch-1", 1), ("batch-8", 8)]


def test_the_parameters_are_the_sidecar(write_plan, tmp_path, capsys):
    path = write_plan()
    code, said = export(capsys, tmp_path, path, "--name", "mine", "--json")
    given = config_of(tmp_path / "models" / "mine").parameters["sdedit_plan"].string_value
    assert code == 0
    assert json.loads(given) == json.loads(said.out)["sdedit_plan"] == plans.read(path).sidecar


def test_a_class_label_is_one_value_an_image(write_plan, tmp_path, capsys):
    assert export(capsys, tmp_path, write_plan(label=True))[0] == 0
    label = config_of(tmp_path / "models" / "closed-form").input[2]
    assert (label.name, type_name(label.data_type), list(label.dims)) == ("class_label", "TYPE_INT64", [1])


@pytest.mark.parametrize(
    ("batch", "preferred"), [((1, 1, 1), None), ((1, 1, 2), [2]), ((1, 4, 4), [4]), ((1, 4, 16), [4, 16])]
)
def test_batches_are_those_of_the_profile(write_plan, tmp_path, capsys, batch, preferred):
    assert export(capsys, tmp_path, write_plan(batch=batch))[0] == 0
    config = config_of(tmp_path / "models" / "closed-form")
    assert config.max_batch_size == batch[2]
    assert config.HasField("dynamic_batching") == (preferred is not None)
    assert list(config.dynamic_batching.preferred_batch_size) == (preferred or [])


def test_a_plan_takes_the_place_of_a_whole_edit_by_force_alone(write_plan, network, tmp_path, capsys):
    path = write_plan()
    assert export(capsys, tmp_path, network, "--steps", "2")[0] == 0
    assert export(capsys, tmp_path, path)[0] == 1
    assert export(capsys, tmp_path, path, "--force")[0] == 0
    config_of(tmp_path / "models" / "closed-form")
    assert [p.name for p in (tmp_path / "models" / "closed-form" / "1").iterdir()] == ["model.plan"]


def test_every_type_of_an_input_has_a_name_in_the_schema():
    assert set(triton_plan.TYPES.values()) <= set(triton.TYPES.values())


@pytest.mark.parametrize(
    ("made", "words", "code", "message", "hint"),
    [
        ({"library": "tensorrt-rtx"}, [], 1, "was built by tensorrt-rtx, whose plans Triton", "--backend tensorrt, or"),
        ({"batch": (4, 4, 8)}, [], 2, "was built for batches of 4 to 8; Triton calls it", "sdedit build --batch 1:8:8"),
        ({}, ["--steps", "3"], 2, "--steps is not for a plan, which is the network alone", "leave it out"),
        ({}, ["--mask"], 2, "--mask is not for a plan", "leave it out"),
        ({}, ["--max-batch", "2"], 2, "--max-batch is not for a plan", "leave it out"),
        ({}, ["--noise", "input"], 2, "--noise is not for a plan", "leave it out"),
        ({}, ["--guide", "float32"], 2, "--guide is not for a plan", "leave it out"),
        ({}, ["--name", "a/b"], 2, "name is 'a/b'; a model of Triton is named in letters", "--name"),
    ],
)
def test_what_triton_cannot_serve_is_refused(write_plan, tmp_path, capsys, made, words, code, message, hint):
    found, said = export(capsys, tmp_path, write_plan(**made), *words)
    error, told = said.err.splitlines()
    assert found == code
    assert message in error
    assert hint in told
    assert not (tmp_path / "models").exists()


def test_a_damaged_plan_is_refused(write_plan, tmp_path, capsys):
    path = write_plan()
    path.write_bytes(b"something els")
    code, said = export(capsys, tmp_path, path)
    assert code == 1
    assert "it is damaged" in said.err
