"""`sdedit export --triton`: a model repository that Triton's schema takes, and that serves what `sdedit edit` gives.

No server runs here. The schema is the published one of inference.ModelConfig, as far as it is used, and `Server` does
with the folder what Triton and its onnxruntime backend do.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from closed_form import SDES, metadata, save
from conftest import SHAPE
from google.protobuf import text_format
from onnx import TensorProto, helper
from triton_schema import MODEL_CONFIG, type_name

import sdedit
from sdedit import artifact
from sdedit.cli.main import main
from sdedit.errors import OptionError, OutputError
from sdedit.export import loop_graph, to_onnx, triton

SCHEDULE: dict[str, Any] = {"t0": 0.5, "steps": 4, "sampler": "ancestral", "eta": None}
HEIGHT, WIDTH = SHAPE[1:]
LAST_SEED = 2**64 - 1
DTYPES = {
    "TYPE_UINT8": ("tensor(uint8)", np.uint8),
    "TYPE_UINT64": ("tensor(uint64)", np.uint64),
    "TYPE_INT64": ("tensor(int64)", np.int64),
    "TYPE_FP32": ("tensor(float)", np.float32),
}

# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """One model of a repository, loaded, warmed up and called as Triton does it."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), MODEL_CONFIG())
        assert self.config.name == folder.name
        assert self.config.backend == "onnxruntime"
        assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["1"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=providers)
        self.check(self.config.input, self.session.get_inputs())
        self.check(self.config.output, self.session.get_outputs())
        for sample in self.config.model_warmup:
            assert set(sample.inputs) == {one.name for one in self.config.input}
            for given in sample.inputs.values():
                assert given.WhichOneof("input_data_type") == "zero_data"
            zeros = {
                name: np.zeros((sample.batch_size, *given.dims), DTYPES[type_name(given.data_type)][1])
                for name, given in sample.inputs.items()
            }
            self.infer(zeros)

    def check(self, described: Any, tensors: Any) -> None:
        """What the backend refuses to load: other names, types or shapes than the graph's, behind the batch."""
        assert [one.name for one in described] == [one.name for one in tensors]
        for one, tensor in zip(described, tensors, strict=True):
            assert DTYPES[type_name(one.data_type)][0] == tensor.type
            assert len(one.dims) >= 1
            dims = one.reshape.shape if one.HasField("reshape") else one.dims
            assert np.prod(dims) == np.prod(one.dims)
            assert [-1, *dims] == [size if isinstance(size, int) else -1 for size in tensor.shape]

    def fits(self, array: np.ndarray, one: Any) -> bool:
        matches = [wanted in (-1, size) for wanted, size in zip(one.dims, array.shape[1:], strict=True)]
        return array.dtype == DTYPES[type_name(one.data_type)][1] and all(matches)

    def infer(self, *requests: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The image of each request; all are put into one batch."""
        sizes = [len(request["guide"]) for request in requests]
        assert sum(sizes) <= self.config.max_batch_size
        feeds = {}
        for one in self.config.input:
            given = [request[one.name] for request in requests]
            assert [len(array) for array in given] == sizes
            assert all(self.fits(array, one) for array in given)
            if one.HasField("reshape"):
                given = [array.reshape(len(array), *one.reshape.shape) for array in given]
            feeds[one.name] = np.concatenate(given)
        (described,) = self.config.output
        (image,) = self.session.run([described.name], feeds)
        assert len(image) == sum(sizes)
        assert self.fits(image, described)
        return np.split(image, np.cumsum(sizes)[:-1])


def write(model: Path, repository: Path, **options: Any) -> Path:
    return triton.write(artifact.read(model), repository, SCHEDULE, **options)[0]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def seed_of(*values: int) -> np.ndarray:
    """[B, 1], as a request carries it."""
    return np.array(values, np.uint64)[:, None]


def soft_mask() -> np.ndarray:
    return np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_requests_with_other_seeds_share_a_batch_and_each_gets_its_own_edit(textured, tmp_path, masked):
    model, guides, seeds = textured[0], [picture(0), picture(1)], [7, LAST_SEED]
    mask = soft_mask() if masked else None
    server = Server(write(model, tmp_path / "models", mask=masked, repeats=2))
    requests = [{"guide": guide[None], "seed": seed_of(seed)} for guide, seed in zip(guides, seeds, strict=True)]
    found = server.infer(*(one | ({"mask": mask[None]} if masked else {}) for one in requests))
    editor = sdedit.load(model, backend="ort-cpu", threads=1)
    for image, guide, seed in zip(found, guides, seeds, strict=True):
        wanted = editor.edit(guide, mask=mask, seed=seed, repeats=2, **SCHEDULE)
        np.testing.assert_array_equal(image[0], wanted.results[0].pixels)


def test_a_request_may_hold_several_images(textured, tmp_path):
    server = Server(write(textured[0], tmp_path / "models"))
    guides, seeds = np.stack([picture(j) for j in range(3)]), (5, 5, 6)
    pair, alone = server.infer(
        {"guide": guides[:2], "seed": seed_of(*seeds[:2])}, {"guide": guides[2:], "seed": seed_of(seeds[2])}
    )
    editor = sdedit.load(textured[0], backend="ort-cpu", threads=1)
    for image, guide, seed in zip((*pair, *alone), guides, seeds, strict=True):
        np.testing.assert_array_equal(image, editor.edit(guide, seed=seed, **SCHEDULE).results[0].pixels)


def test_the_bundled_model_is_served_as_float32(tmp_path):
    server = Server(write(artifact.BUNDLED, tmp_path / "models", guide="float32", max_batch=2))
    assert list(server.config.input[0].dims) == [3, 64, 64]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    given = np.moveaxis(pixels, 3, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    found = server.infer(*({"guide": given[j : j + 1], "seed": seed_of(7 + j)} for j in range(2)))
    wanted = sdedit.load(artifact.BUNDLED, backend="ort-cpu", threads=1).edit(list(pixels), seed=7, **SCHEDULE)
    np.testing.assert_allclose(np.concatenate(found), wanted.x, atol=1e-5)


def test_further_inputs_of_the_network_are_one_value_an_image(labelled, tmp_path):
    server = Server(write(labelled, tmp_path / "models"))
    requests = [{"guide": picture(0)[None], "seed": seed_of(0), "class_label": np.array([[k]])} for k in (2, 5)]
    two, five = server.infer(*requests)
    np.testing.assert_array_equal(np.unique(two), [153])
    np.testing.assert_array_equal(np.unique(five), [191])


def test_a_model_for_any_size_takes_any_and_warms_up_with_its_own(tmp_path):
    described = metadata(SHAPE, SDES["vp"])
    described["image"]["dynamic"] = True
    nodes = [helper.make_node("Tanh", ["x"], ["denoised"])]
    inputs = {"x": (TensorProto.FLOAT, ["B", 3, "h", "w"]), "sigma": (TensorProto.FLOAT, ["B"])}
    outputs = {"denoised": (TensorProto.FLOAT, ["B", 3, "h", "w"])}
    model = save(tmp_path / "free.onnx", nodes, {}, described, shape=SHAPE, inputs=inputs, outputs=outputs)
    server = Server(write(model, tmp_path / "models", mask=True))
    assert [list(one.dims) for one in server.config.input] == [[-1, -1, 3], [-1, -1], [1]]
    assert list(server.config.model_warmup[0].inputs["guide"].dims) == [HEIGHT, WIDTH, 3]
    request = {"guide": np.zeros((1, 5, 7, 3), np.uint8), "mask": np.zeros((1, 5, 7), np.uint8), "seed": seed_of(1)}
    assert server.infer(request)[0].shape == (1, 5, 7, 3)


def test_weights_beside_the_graph_are_found(network, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "LARGEST_FILE", 100)
    folder = write(network, tmp_path / "models")
    assert sorted(contents(folder)) == ["1/model.onnx", "1/model.onnx.data", "config.pbtxt"]
    Server(folder)
    write(network, tmp_path / "models", force=True)
    Server(folder)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_the_configuration_is_this(network, tmp_path):
    config = Server(write(network, tmp_path / "models", mask=True)).config
    assert text_format.MessageToString(config, as_one_line=True).startswith(
        'name: "closed-form" max_batch_size: 8 '
        f'input {{ name: "guide" data_type: TYPE_UINT8 dims: {HEIGHT} dims: {WIDTH} dims: 3 }} '
        f'input {{ name: "mask" data_type: TYPE_UINT8 dims: {HEIGHT} dims: {WIDTH} }} '
        'input { name: "seed" data_type: TYPE_UINT64 dims: 1 reshape { } } '
        f'output {{ name: "image" data_type: TYPE_UINT8 dims: {HEIGHT} dims: {WIDTH} dims: 3 }} '
        "instance_group { count: 1 } "
        "dynamic_batching { preferred_batch_size: 4 preferred_batch_size: 8 max_queue_delay_microseconds: 5000 } "
        'parameters { key: "sdedit_loop" '
    )
    assert [(one.name, one.batch_size) for one in config.model_warmup] == [("batch-1", 1), ("batch-8", 8)]


def test_the_parameters_say_which_edit_it_is(network, tmp_path):
    folder, written = triton.write(artifact.read(network), tmp_path / "models", SCHEDULE, name="mine")
    assert folder == tmp_path / "models" / "mine"
    given = Server(folder).config.parameters["sdedit_loop"].string_value
    assert json.loads(given) == written == artifact.loop_metadata(folder / "1" / "model.onnx")


@pytest.mark.parametrize(("most", "preferred"), [(1, None), (2, [2]), (3, [2, 3]), (16, [8, 16])])
def test_preferred_batches_are_half_and_whole(network, tmp_path, most, preferred):
    config = Server(write(network, tmp_path / "models", max_batch=most)).config
    assert config.max_batch_size == most
    assert config.HasField("dynamic_batching") == (preferred is not None)
    assert list(config.dynamic_batching.preferred_batch_size) == (preferred or [])


@pytest.mark.parametrize("text", ["max_batch: 8", "input { shape: [ 1 ] }", 'input { data_type: "TYPE_UINT8" }'])
def test_the_schema_of_these_tests_refuses_what_it_does_not_know(text):
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, MODEL_CONFIG())


@pytest.mark.parametrize("text", ["plain", 'quote " and \\ and é and \n', ""])
def test_any_text_is_read_back(text):
    written = triton.to_text({"parameters": [{"key": "k", "value": {"string_value": text}}]})
    assert text_format.Parse(written, MODEL_CONFIG()).parameters["k"].string_value == text


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_second_model_joins_the_first(network, paint, tmp_path):
    write(network, tmp_path / "models", name="one")
    write(paint, tmp_path / "models", name="two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["one", "two"]


def test_an_existing_model_is_replaced_only_by_force(network, tmp_path):
    folder = write(network, tmp_path / "models")
    before = contents(folder)
    with pytest.raises(OutputError, match="closed-form: exists already"):
        write(network, tmp_path / "models", mask=True)
    assert contents(folder) == before
    write(network, tmp_path / "models", mask=True, force=True)
    assert [one.name for one in Server(folder).config.input] == ["guide", "mask", "seed"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["closed-form"]


def test_force_replaces_nothing_that_we_did_not_write(network, tmp_path):
    folder = write(network, tmp_path / "models")
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_text("theirs")
    with pytest.raises(OutputError, match=r"holds more than --force replaces: 2/model\.onnx"):
        write(network, tmp_path / "models", force=True)
    assert (folder / "2" / "model.onnx").read_text() == "theirs"


def test_a_link_is_not_replaced(network, tmp_path):
    folder = write(network, tmp_path / "models")
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(OutputError, match="link: is a file or a link"):
        write(network, tmp_path / "models", name="link", force=True)
    assert link.is_symlink()


def test_an_input_is_not_replaced(network, tmp_path):
    folder = tmp_path / "models" / "mine"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(network.read_bytes())
    with pytest.raises(OutputError, match="would overwrite an input"):
        write(folder / "1" / "model.onnx", tmp_path / "models", name="mine", force=True)


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_at_the_end_leaves_what_was_there(network, tmp_path, monkeypatch, existed):
    if existed:
        write(network, tmp_path / "models")
    before = contents(tmp_path)
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        if existed:  # the old model has left by then
            rename(source, target)
            monkeypatch.setattr(os, "rename", fail_twice)
        else:
            raise OSError(28, "No space left on device")

    def fail_twice(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write(network, tmp_path / "models", mask=True, force=True)
    assert contents(tmp_path) == before
    assert (tmp_path / "models").exists() == existed


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "two words", "é"])
def test_a_name_that_is_no_folder_of_triton_is_refused(network, tmp_path, name):
    with pytest.raises(OptionError, match="a model of Triton is named in letters"):
        write(network, tmp_path / "models", name=name)
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_it_and_prints_where(network, tmp_path, capsys):
    repository = tmp_path / "models"
    flags = ["--t0", "0.4", "--steps", "3", "--sampler", "ddim", "--eta", "0.5", "--repeats", "2", "--mask"]
    words = ["export", "--triton", str(repository), str(network), "--guide", "float32", "--max-batch", "4"]
    assert main([*words, *flags]) == 0
    said = capsys.readouterr()
    assert said.out == f"{repository / 'closed-form'}\n"
    assert said.err == "the edit of closed-form: t0 0.4, 3 steps, ddim\n"
    config = Server(repository / "closed-form").config
    assert (config.max_batch_size, type_name(config.input[0].data_type)) == (4, "TYPE_FP32")
    assert main([*words, "--loop", "--noise", "graph", "--name", "other", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(repository / "other")
    assert found[loop_graph.PROPERTY]["steps"] == 50


def test_without_a_source_it_is_the_bundled_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--triton", "models", "--steps", "2"]) == 0
    assert capsys.readouterr().out == f"{Path('models', 'eurosat-64')}\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--triton", "models", "-o", "edit.onnx"], 2, "--output is not for --triton"),
        (["--triton", "models", "--opset", "19"], 2, "--opset is not for --triton"),
        (["--triton", "models", "--family", "edm"], 2, "--triton takes one of our artifacts, not edm"),
        (["--triton", "models", "--noise", "input"], 2, "--noise is not for --triton: given noise has the batch as"),
        (["--triton", "models", "--guide", "float64"], 2, "guide is 'float64'; wanted uint8 or float32"),
        (["--triton", "models", "--name", "a/b"], 2, "name is 'a/b'; a model of Triton is named in letters"),
        (["--triton", "models", "--max-batch", "2147483648"], 2, "max-batch is 2147483648; wanted 1 to 2147483647"),
        (["--triton", "none/models"], 1, "none: no such folder"),
        (["--triton", "model.onnx"], 1, "model.onnx: is not a folder"),
        (["-o", "edit.onnx", "--max-batch", "4"], 2, "--max-batch goes with --triton"),
        (["--loop", "-o", "edit.onnx", "--max-batch", "4"], 2, "--max-batch goes with --triton"),
    ],
)
def test_a_wrong_option_is_one_error_and_nothing_is_written(
    network, tmp_path, monkeypatch, capsys, words, code, message
):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(network.read_bytes())
    assert main(["export", "model.onnx", *words]) == code
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
