"""`sdedit export`: any network in, one verified artifact out; what cannot be verified is not written."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sdedit
from sdedit import artifact
from sdedit.backends import ort_cache
from sdedit.cli.export import read_config
from sdedit.cli.main import main
from sdedit.errors import ArtifactError, OptionError, OutOfTolerance
from sdedit.export import export_denoiser, exporting, to_onnx
from sdedit.export import schedules as published
from sdedit.export.denoiser import Convention, Denoiser

NETWORK = '''
import torch
from torch import nn

class Tiny(nn.Module):
    """Six channels out: the last three are a learned variance."""
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.outer = nn.Conv2d(8, 6, 3, padding=1)
    def forward(self, x, label):
        return self.outer(torch.sigmoid(self.inner(x) + self.time(label[:, None] / 1000)[:, :, None, None]))

def tiny():
    torch.manual_seed(0)
    return Tiny()

def number():
    return 7

def broken():
    raise RuntimeError("no such file: weights.bin")

def leaves():
    raise SystemExit(0)

def scripted():
    return torch.jit.script(nn.Tanh())
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a network in it, importable as `tinynet`."""
    (tmp_path / "tinynet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tinynet", None)


def tiny() -> nn.Module:
    scope: dict = {}
    exec(NETWORK, scope)
    return scope["tiny"]()


def run_artifact(path: Path, x: np.ndarray, sigma: np.ndarray, **conditions: float) -> np.ndarray:
    return sdedit.load(path, backend="ort-cpu", threads=1).backend.bind(len(x), conditions)(x, sigma)


def inputs(sigma: float, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(0, 1 + sigma, (2, 3, size, size)).astype(np.float32)
    return x, np.full(2, sigma, np.float32)


def by_the_formula(net: nn.Module, x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """An eps network on the linear schedule of 1,000 levels, written out."""
    sde = published.linear()
    label = torch.from_numpy(1000 * sde.time(sigma) - 1).float()
    state = torch.from_numpy(x / np.sqrt(1 + sigma[:, None, None, None] ** 2))
    with torch.no_grad():
        return x - sigma[:, None, None, None] * net(state, label)[:, :3].numpy()


MODULE = ["--module", "tinynet:tiny", "--sde", "linear", "--size", "16"]


# --- any module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.7, 12.0, 140.0])
def test_a_module_becomes_d_of_x_and_sigma(here, sigma):
    assert main(["export", *MODULE, "-o", "tiny.onnx"]) == 0
    x, sigmas = inputs(sigma)
    expected = by_the_formula(tiny(), x, sigmas)
    np.testing.assert_allclose(run_artifact(here / "tiny.onnx", x, sigmas), expected, atol=2e-5 * (1 + sigma))


def test_its_weights_come_from_the_checkpoint_ema_first(here):
    other, average = tiny(), tiny()
    for net, level in ((other, 0.1), (average, 0.2)):
        for p in net.parameters():
            nn.init.constant_(p, level)
    torch.save({"model": other.state_dict(), "ema": average.state_dict(), "step": 3}, "weights.pt")
    for flags, net in (([], average), (["--weights", "model"], other)):
        assert main(["export", "weights.pt", *MODULE, *flags, "-o", "tiny.onnx", "--force"]) == 0
        x, sigmas = inputs(1.0)
        np.testing.assert_allclose(
            run_artifact(here / "tiny.onnx", x, sigmas), by_the_formula(net, x, sigmas), atol=1e-4
        )


def test_what_was_recognised_and_the_table_are_shown(here, capsys):
    assert main(["export", *MODULE, "-o", "tiny.onnx"]) == 0
    said = capsys.readouterr()
    assert "recognised: module: Tiny, 0.0 M parameters, predicts eps, model weights" in said.err
    assert said.out.count("schedule") == 8
    assert said.out.count("edit") == 8
    assert said.out.endswith("tolerance 1e-05: ok\ntiny.onnx\n")


def test_json_is_one_object_with_the_verification(here, capsys):
    assert main(["export", *MODULE, "-o", "tiny.onnx", "--name", "mine", "--license", "MIT", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "tiny.onnx"
    assert found["verification"]["within"] is True
    written = artifact.read(here / "tiny.onnx").metadata
    assert written["name"] == "mine"
    assert written["license"] == "MIT"
    assert written["verification"]["within"] is True
    assert found["metadata"] == written


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--module", "tinynet"], 2, "--module tinynet: not of the form package.module:factory"),
        (["--module", "tinynet:other"], 2, "--module tinynet:other: AttributeError: module 'tinynet' has no attribute"),
        (["--module", "nothere:net"], 2, "--module nothere:net: ModuleNotFoundError: No module named 'nothere'"),
        (["--module", "tinynet:broken"], 2, "--module tinynet:broken: RuntimeError: no such file: weights.bin"),
        (["--module", "tinynet:leaves"], 2, "--module tinynet:leaves: SystemExit: 0"),
        (["--module", "tinynet:scripted"], 2, "--module tinynet:scripted: returned a ScriptModule"),
        (["--module", "tinynet:number"], 2, "--module tinynet:number: returned a int, not a torch.nn.Module"),
        (["--sde", "quartic"], 2, "--sde quartic: no schedule is called 'quartic'"),
        (["--predicts", "noise"], 2, "predicts is 'noise'"),
        (["--multiple", "4"], 2, "--multiple without --dynamic"),
        (["--sigma-data", "0.7"], 2, "--sigma-data without --predicts edm"),
        (["--precision", "fp8"], 2, "unknown precision 'fp8'"),
        (["--opset", "17"], 2, "opset is 17; wanted 18 to 22 for fp32"),
        (["--guide", "none.png"], 1, "none.png: no such file"),
        (["-o", "tiny.plan"], 2, "tiny.plan: an artifact's name ends in .onnx"),
        (["-o", "no/tiny.onnx"], 1, "no: no such folder"),
        (["--checkpoint", "none.pt"], 1, "none.pt: no such file"),
    ],
)
def test_a_wrong_option_is_one_error_and_nothing_is_written(here, capsys, flags, code, message):
    before = sorted(here.iterdir())
    assert main(["export", *MODULE, "-o", "tiny.onnx", *flags]) == code
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == before


def test_a_checkpoint_that_does_not_fit_names_the_tensors(here, capsys):
    wrong = tiny().state_dict()
    wrong["inner.weight"] = torch.zeros(8, 4, 3, 3)
    wrong |= {f"extra.{n}": torch.zeros(1) for n in range(7)}
    del wrong["time.bias"]
    torch.save(wrong, "wrong.pt")
    assert main(["export", "wrong.pt", *MODULE, "-o", "tiny.onnx"]) == 1
    assert (
        "inner.weight has shape [8, 4, 3, 3], expected [8, 3, 3, 3]; 1 missing (time.bias); "
        "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4, …)"
    ) in capsys.readouterr().err


def test_an_existing_file_is_kept_without_force(here, capsys):
    Path("tiny.onnx").write_text("precious")
    assert main(["export", *MODULE, "-o", "tiny.onnx"]) == 1
    assert Path("tiny.onnx").read_text() == "precious"
    assert "tiny.onnx: exists already" in capsys.readouterr().err


# --- from Python ---------------------------------------------------------------------------------------------------


def test_export_denoiser_does_the_same_from_python(tmp_path):
    net = tiny().train()
    report = export_denoiser(net, tmp_path / "tiny.onnx", sde=published.linear(), size=(16, 24))
    assert report.within
    assert net.training
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}  # it stays as it was
    assert artifact.read(tmp_path / "tiny.onnx").frame() == (24, 16)


def test_a_class_label_stays_an_input(tmp_path):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.table = tiny(), nn.Embedding(4, 6)

        def forward(self, x, label, class_label):
            return self.net(x, label) + self.table(class_label)[:, :, None, None]

    conditions = {"class_label": {"dtype": "int64", "count": 4}}
    export_denoiser(Labelled(), tmp_path / "labelled.onnx", sde="linear", size=16, conditions=conditions)
    x, sigma = inputs(1.0)
    images = [run_artifact(tmp_path / "labelled.onnx", x, sigma, class_label=k) for k in (0, 3)]
    assert np.abs(images[0] - images[1]).max() > 0.1
    with pytest.raises(OptionError, match="class_label is 4"):
        run_artifact(tmp_path / "labelled.onnx", x, sigma, class_label=4)
    assert main(["export", str(tmp_path / "labelled.onnx"), "--precision", "int8", "-o", str(tmp_path / "8.onnx")]) == 0
    assert artifact.read(tmp_path / "8.onnx").extra_inputs.keys() == {"class_label"}


class Forgetful(nn.Module):
    """Says something else when it is traced than when it runs."""

    def forward(self, x, label):
        return x * (2.0 if torch.jit.is_tracing() else 2.001)


def test_what_is_out_of_tolerance_is_not_written(tmp_path):
    with pytest.raises(OutOfTolerance, match=r"not written: error .* tolerance 1e-05"):
        export_denoiser(Forgetful(), tmp_path / "wrong.onnx", sde="linear", size=16)
    assert list(tmp_path.iterdir()) == []


def test_out_of_tolerance_exits_3_unless_allowed_and_then_it_is_marked(here, capsys):
    (here / "tinynet.py").write_text(
        "import torch\nclass F(torch.nn.Module):\n    def forward(self, x, label):\n"
        "        return x * (2.0 if torch.jit.is_tracing() else 2.001)\n"
    )
    flags = ["export", "--module", "tinynet:F", "--sde", "linear", "--size", "16", "-o", "wrong.onnx"]
    assert main(flags) == 3
    assert not Path("wrong.onnx").exists()
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "error: wrong.onnx: not written" in said.err
    assert main([*flags, "--allow-inaccurate"]) == 3
    assert artifact.read(here / "wrong.onnx").metadata["verification"]["within"] is False


def test_an_int8_file_without_an_int8_layer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "quantize", lambda model, feeds, excess: model)
    assert main(["export", str(artifact.BUNDLED), "--precision", "int8", "-o", str(tmp_path / "int8.onnx")]) == 3
    assert "not written: no layer of the network may be int8 within the tolerance" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_any_size_that_is_a_multiple(tmp_path):
    export_denoiser(tiny(), tmp_path / "free.onnx", sde="linear", size=16, dynamic=True, multiple=4)
    editor = sdedit.load(tmp_path / "free.onnx", threads=1)
    guide = np.full((20, 40, 3), 128, np.uint8)
    assert editor.edit(guide, steps=2, size=(40, 20)).images[0].size == (40, 20)
    assert editor.edit(guide, steps=2).images[0].size == (16, 16)
    with pytest.raises(OptionError, match="size is 42x20; free takes multiples of 4"):
        editor.edit(guide, steps=2, size=(42, 20))


def test_a_fixed_model_refuses_another_size(tmp_path, capsys):
    export_denoiser(tiny(), tmp_path / "fixed.onnx", sde="linear", size=16)
    with pytest.raises(OptionError, match="size is 32x32; fixed is fixed to 16x16"):
        sdedit.load(tmp_path / "fixed.onnx", threads=1).edit(np.zeros((32, 32, 3), np.uint8), size=(32, 32))


# --- somebody else's graph -----------------------------------------------------------------------------------------


class Sigmas(nn.Module):
    """A foreign interface: names of its own, int64 time or σ, and a class to fold in."""

    def __init__(self):
        super().__init__()
        self.net, self.table = tiny(), nn.Embedding(4, 6)

    def forward(self, noisy, step, kind):
        return self.net(noisy, step.float()) + self.table(kind)[:, :, None, None]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    torch.manual_seed(0)
    net = Sigmas().eval()
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    examples = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    names = ["noisy", "step", "kind"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, examples, str(path), input_names=names, output_names=["noise"], opset_version=17, dynamo=False,
            dynamic_axes={name: {0: "N"} for name in (*names, "noise")},
        )  # fmt: skip
    return net, str(path)


def test_a_foreign_graph_is_wrapped_in_our_conventions(foreign, tmp_path):
    net, path = foreign
    out = tmp_path / "ours.onnx"
    assert (
        main(["export", path, "--sde", "linear", "--inputs", "noisy,step", "--constant", "kind=2", "-o", str(out)]) == 0
    )
    x, sigma = inputs(2.0)
    label = torch.from_numpy(np.round(1000 * published.linear().time(sigma) - 1)).long()
    with torch.no_grad():
        raw = net(torch.from_numpy(x) / 5**0.5, label, torch.full((2,), 2))[:, :3].numpy()
    np.testing.assert_allclose(run_artifact(out, x, sigma), x - 2 * raw, atol=1e-4)
    assert artifact.read(out).metadata["source"]["family"] == "onnx"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "an ONNX file without our metadata; its conventions must be said"),
        (["--sde", "linear"], "has the inputs noisy, step, kind; which are the noisy image and the time label"),
        (["--sde", "linear", "--inputs", "noisy,step"], "has a further input 'kind' and no value for it"),
        (["--sde", "linear", "--inputs", "x,step"], "has no input 'x'"),
        (["--sde", "linear", "--inputs", "noisy"], "--inputs names 1 inputs"),
        (["--sde", "linear", "--constant", "kind=1", "--output-name", "eps"], "has no output 'eps'"),
        (["--sde", "linear", "--constant", "kind=1", "--size", "32"], "is fixed to 16 x 16"),
        (["--sde", "linear", "--inputs", "step,noisy", "--constant", "kind=1"], "is not a float32 image batch"),
        (["--sde", "linear", "--constant", "kind=1", "--constant", "colour=1"], "has no input 'colour' to fold"),
    ],
)
def test_a_foreign_graph_needs_to_be_told_what_is_what(foreign, tmp_path, capsys, flags, message):
    assert main(["export", foreign[1], *flags, "-o", str(tmp_path / "ours.onnx")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- our own artifacts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.onnx"
    export_denoiser(tiny(), path, sde="linear", size=16, name="own", license="CC0-1.0")
    return path


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-3), ("bf16", 3e-2), ("int8", 0.2)])
def test_an_artifact_changes_its_precision(own, tmp_path, precision, tolerance, capsys):
    out = tmp_path / "reduced.onnx"
    assert main(["export", str(own), "--precision", precision, "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["verification"]["worst"]["error"] < tolerance
    assert found["verification"]["images"]["steps"] == 50
    opened = artifact.read(out)
    assert found["metadata"] == opened.metadata
    assert (opened.precision, opened.name, opened.metadata["license"]) == (precision, "own", "CC0-1.0")
    assert [t.element for t in (*opened.inputs, *opened.outputs)] == ["float32"] * 3


class ThreeLayers(nn.Module):
    """(x, time label) -> eps"""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 8), (8, 8), (8, 3))
        self.layers = nn.Sequential(*(nn.Conv2d(one, other, 3, padding=1) for one, other in sizes))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * (1 + label[:, None, None, None] / 1000) / 50


@pytest.fixture
def three_layers(tmp_path):
    torch.manual_seed(0)
    export_denoiser(ThreeLayers(), tmp_path / "own.onnx", sde="linear", size=16)
    return tmp_path / "own.onnx"


@pytest.fixture
def refusing(monkeypatch):
    """Has verification refuse so many files, and gives the errors of all that it was asked about."""

    def refuse(times):
        asked = []

        def refuses(*given, tolerance, **told):
            report = compare(*given, tolerance=tolerance, **told)
            asked.append(report.worst.error)
            return replace(report, tolerance=report.worst.error / 1.05 if len(asked) <= times else tolerance)

        compare = exporting.verify.compare
        monkeypatch.setattr(exporting.verify, "compare", refuses)
        return asked

    return refuse


def test_calibration_sees_edits_and_fresh_noise_of_every_level(three_layers, tmp_path):
    graph = exporting.from_artifact(three_layers, tmp_path)
    sde = artifact.read(three_layers).sde
    frames = np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    feeds = exporting.calibration(graph, sde, frames)
    assert all(
        feed["x"].shape == (2, 3, 16, 16) and feed["x"].dtype == feed["sigma"].dtype == np.float32 for feed in feeds
    )
    edits, fresh = (feeds[at : at + 12] + feeds[at + 24 : at + 36] for at in (0, 12))
    assert {feed["sigma"][0] for feed in edits} == {np.float32(sde.sigma(0.5 * n / 12)) for n in range(1, 13)}
    levels = [feed["sigma"][0] for feed in fresh[:12]]
    assert (levels[0], levels[-1]) == (np.float32(sde.sigma(1)), np.float32(sde.sigma_min))
    np.testing.assert_allclose(np.divide(levels[1:], levels[:-1]), (levels[-1] / levels[0]) ** (1 / 11), rtol=1e-5)
    pairs = [frames[:2]] * 12 + [frames[[2, 2]]] * 12
    noises = [(feed["x"] - pair) / feed["sigma"][0] for feed, pair in zip(fresh, pairs, strict=True)]
    assert all(abs(noise.std() - 1) < 0.1 for noise in noises)
    flat = np.array([noise.ravel()[:768] for noise in noises] + [noise.ravel()[768:] for noise in noises])
    used = [sdedit.Noise([seed], (3, 16, 16))(0, 0, 0).ravel() for seed in range(4)]  # by edits and comparisons
    flat = np.concatenate([flat, used])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.2  # none is used twice


@pytest.mark.parametrize("levels", [(0.5,), (0.5, 0.0), (0.5, 0.0, 0.0)])
def test_a_schedule_of_one_level_can_be_calibrated_on(three_layers, tmp_path, levels):
    graph, sde = exporting.from_artifact(three_layers, tmp_path), sdedit.VPDiscrete(levels)
    feeds = exporting.calibration(graph, sde, np.zeros((2, 3, 16, 16), np.float32))
    assert all(np.isfinite(feed["x"]).all() and (feed["sigma"] > 0).all() for feed in feeds)


def test_an_int8_file_that_verification_refuses_is_made_again(three_layers, refusing, capsys):
    asked, made = refusing(1), three_layers.with_name("int8.onnx")
    assert main(["export", str(three_layers), "--precision", "int8", "-o", str(made), "--json"]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["verification"]["worst"]["error"] == asked[1] < asked[0]
    assert re.search(rf"error {asked[0]:.2g} at σ = [0-9.]+, tolerance [0-9.e-]+: again with fewer layers\n", told)


def test_how_much_a_refused_file_errs_too_much_is_told_to_the_quantizer(three_layers, refusing, monkeypatch):
    told = []

    def watched(model, feeds, excess):
        def watch(made):
            told.append(excess(made))
            return told[-1]

        return quantize(model, feeds, excess=watch)

    quantize = exporting.quantize
    asked = refusing(1)
    monkeypatch.setattr(exporting, "quantize", watched)
    assert main(["export", str(three_layers), "--precision", "int8", "-o", str(three_layers.with_name("i.onnx"))]) == 0
    assert told == pytest.approx([1.05, asked[1] / exporting.verify.TOLERANCES["int8"]])


def test_refused_files_leave_no_weights_behind(three_layers, refusing, monkeypatch):
    monkeypatch.setattr(to_onnx, "LARGEST_FILE", 100)
    sizes = []
    for refused in (0, 1):
        refusing(refused)
        made = three_layers.with_name(f"{refused}.onnx")
        assert main(["export", str(three_layers), "--precision", "int8", "-o", str(made)]) == 0
        sizes.append(made.with_name(f"{made.name}.data").stat().st_size)
    assert sizes[1] < 2 * sizes[0]  # fewer layers are int8, and none lies there twice


@pytest.mark.parametrize(("precision", "refused"), [("fp16", 0), ("int8", 0), ("int8", 1)])
def test_only_files_that_stay_are_in_the_graph_cache(three_layers, refusing, precision, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(ort_cache, "LEAST_BYTES", 1)
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    refusing(refused)
    made = three_layers.with_name(f"{precision}.onnx")
    assert main(["export", str(three_layers), "--precision", precision, "-o", str(made)]) == 0
    entries = (tmp_path / "cache" / "graphs").glob("*/entry.json")
    kept = {json.loads(entry.read_text())["identity"]["artifact"] for entry in entries}
    assert kept == {artifact.read(three_layers).sha256}


def test_an_int8_file_that_verification_refuses_is_written_where_that_is_allowed(three_layers, refusing):
    asked, made = refusing(100), three_layers.with_name("int8.onnx")
    command = ["export", str(three_layers), "--precision", "int8", "-o", str(made), "--allow-inaccurate"]
    assert main(command) == 3
    assert len(asked) == 1
    assert artifact.read(made).metadata["verification"]["within"] is False


@pytest.mark.parametrize("opset", [18, 20, 21, 22])
def test_an_artifact_changes_its_opset(own, tmp_path, opset):
    assert main(["export", str(own), "--opset", str(opset), "-o", str(tmp_path / "other.onnx")]) == 0
    assert artifact.read(tmp_path / "other.onnx").opset == opset


# --- files ---------------------------------------------------------------------------------------------------------


def test_weights_beyond_one_file_go_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(to_onnx, "LARGEST_FILE", 1000)
    export_denoiser(tiny(), tmp_path / "large.onnx", sde="linear", size=16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    opened = artifact.read(tmp_path / "large.onnx")
    assert opened.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    x, sigma = inputs(1.0)
    np.testing.assert_allclose(
        run_artifact(tmp_path / "large.onnx", x, sigma), by_the_formula(tiny(), x, sigma), atol=1e-4
    )
    before = opened.sha256
    data = bytearray((tmp_path / "large.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "large.onnx.data").write_bytes(data)
    assert artifact.read(tmp_path / "large.onnx").sha256 != before


def with_external(path: Path, location: str) -> Path:
    """A model whose weight is said to lie at `location`."""
    weight = numpy_helper.from_array(np.zeros((1, 3, 16, 16), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["denoised"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, 16, 16]),
         helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["B"])],
        [helper.make_tensor_value_info("denoised", TensorProto.FLOAT, ["B", 3, 16, 16])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = {
        "format": 1,
        "image": {"channels": 3, "height": 16, "width": 16},
        "sde": {"kind": "vp", "beta_min": 0.1, "beta_max": 20},
    }
    helper.set_model_props(model, {"sdedit": json.dumps(metadata)})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "\\\\host\\secret", "..\\secret", ""]
)
def test_external_data_may_not_leave_the_folder(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(3072))
    (tmp_path / "in").mkdir()
    path = with_external(tmp_path / "in" / "model.onnx", location)
    with pytest.raises(ArtifactError, match="outside its folder"):
        artifact.read(path)


@pytest.mark.parametrize("inside", [False, True], ids=["a node", "a node of a branch"])
def test_external_data_of_a_constant_is_found_too(tmp_path, inside):
    path = with_external(tmp_path / "model.onnx", "beside.data")
    model = onnx.load(path, load_external_data=False)
    constant = helper.make_node("Constant", [], ["w"], value=model.graph.initializer.pop())
    if inside:
        branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, None)])
        true = helper.make_node("Constant", [], ["true"], value=numpy_helper.from_array(np.array(True)))
        nodes = [true, helper.make_node("If", ["true"], ["w"], then_branch=branch, else_branch=branch)]
    else:
        nodes = [constant]
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"its weights are in 'beside.data', which is not beside it"):
        artifact.read(path)


def test_weights_that_a_branch_reads_stay_with_it(tmp_path):
    """Those of the graph around it: in another opset, wrapped as somebody else's, and in a whole edit."""

    def branch(name):
        product = helper.make_node("Mul", ["x", name], [f"{name}.x"])
        return helper.make_graph([product], name, [], [helper.make_tensor_value_info(f"{name}.x", 1, None)])

    path = with_external(tmp_path / "model.onnx", "unused")
    model = onnx.load(path, load_external_data=False)
    del model.graph.node[:], model.graph.initializer[:]
    branches = {"then_branch": branch("half"), "else_branch": branch("third")}
    model.graph.node.append(helper.make_node("If", ["yes"], ["denoised"], **branches))
    weights = {"yes": np.array(True), "half": np.float32(0.5), "third": np.float32(0.3)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    onnx.save(model, path)
    x, sigma = inputs(2.0)
    assert main(["export", str(path), "--opset", "20", "-o", str(tmp_path / "20.onnx")]) == 0
    np.testing.assert_allclose(run_artifact(tmp_path / "20.onnx", x, sigma), 0.5 * x, rtol=1e-6)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "theirs.onnx")
    words = ["--sde", "edm", "--predicts", "denoiser", "--inputs", "x,sigma", "-o", str(tmp_path / "ours.onnx")]
    assert main(["export", str(tmp_path / "theirs.onnx"), *words]) == 0
    np.testing.assert_allclose(run_artifact(tmp_path / "ours.onnx", x, sigma), 0.5 * x, rtol=1e-6)
    assert main(["export", "--loop", str(path), "-o", str(tmp_path / "edit.onnx"), "--steps", "2"]) == 0


def test_external_data_that_is_missing_is_named(tmp_path):
    path = with_external(tmp_path / "model.onnx", "model.onnx.data")
    with pytest.raises(ArtifactError, match=r"its weights are in 'model.onnx.data', which is not beside it"):
        artifact.read(path)


# --- nothing in a checkpoint runs ----------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["torch", "torch-legacy", "pickle"])
@pytest.mark.parametrize("flags", [[], MODULE])
def test_a_malicious_checkpoint_does_not_run(here, capsys, kind, flags):
    payload = {"state_dict": Bomb(), "model": {"w": torch.zeros(1)}}
    if kind == "pickle":
        Path("evil.pkl").write_bytes(pickle.dumps({"ema": Bomb()}))
    else:
        torch.save(payload, "evil.pkl", _use_new_zipfile_serialization=kind == "torch")
    assert main(["export", "evil.pkl", *flags, "-o", "out.onnx"]) == 1
    error = capsys.readouterr().err
    assert "mkdir" in error
    assert "only tensors and plain containers" in error
    assert not Path("ran").exists()
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_lists_that_hold_each_other_a_million_times_over_are_refused(here, capsys, kind):
    laughs: list = [torch.zeros(1)]
    for _ in range(40):
        laughs = [laughs, laughs]
    if kind == "torch":
        torch.save({"model": laughs}, "laughs.pt")
    else:
        Path("laughs.pt").write_bytes(pickle.dumps({"ema": laughs[0]}))
    assert main(["export", "laughs.pt", "-o", "out.onnx"]) == 1
    assert "more than 1000000 values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "neither safetensors nor a PyTorch file nor a pickle"),
        (b"PK\x03\x04" + bytes(100), "a damaged PyTorch file"),
        ((8).to_bytes(8, "little") + b"{" + bytes(99), "not a whole safetensors file"),
        (b"\x80\x04\x95", "pickle"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_clear_error(here, capsys, content, message):
    Path("weights.pt").write_bytes(content)
    assert main(["export", "weights.pt", "-o", "out.onnx"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"\x98\x9a\0", b"\x98\x9a\0\0\0\0\0\0{}", b"\xff" * 7 + b"\x7f{}", b"<html></html>"]
)
def test_a_file_that_only_is_called_safetensors_is_said_to_be_none(here, capsys, content):
    Path("weights.safetensors").write_bytes(content)
    assert main(["export", "weights.safetensors", "-o", "out.onnx"]) == 1
    error = capsys.readouterr().err
    assert "weights.safetensors: not a whole safetensors file: " in error
    assert "hint: download it again" in error


def test_an_unknown_kind_lists_what_was_looked_for_and_the_nearest(here, capsys):
    torch.save({"time_embed.0.weight": torch.zeros(4, 4), "other.weight": torch.zeros(1)}, "odd.pt")
    assert main(["export", "odd.pt", "-o", "out.onnx"]) == 1
    error = capsys.readouterr().err
    assert "odd.pt: of no known kind (nearest is guided-diffusion" in error
    for family in ("diffusers", "ddpm", "score-sde", "edm"):
        assert f"{family}: " in error
    assert "--module package.module:factory" in error


def test_a_folder_that_is_no_diffusers_model_is_refused(here, capsys):
    assert main(["export", str(here), "-o", "out.onnx"]) == 1
    assert "a folder, and not a diffusers model" in capsys.readouterr().err


def test_presets_are_listed(capsys):
    assert main(["export", "--preset", "list"]) == 0
    assert "score-sde: " in capsys.readouterr().out


def test_the_traced_conventions_are_the_modules(tmp_path):
    """What the exporter folds in is Denoiser itself: one statement of the formulas."""
    net = tiny()
    convention = Convention(published.cosine(), "v", "continuous", 1000.0)
    model = to_onnx.trace(Denoiser(net, convention), (3, 16, 16))
    onnx.checker.check_model(model, full_check=True)
    assert {i.name for i in model.graph.input} == {"x", "sigma"}


@pytest.mark.parametrize(
    ("given", "config"),
    [
        (None, {}),
        (["a=1", "b=x", "c=[1, 2]", "d=true"], {"a": 1, "b": "x", "c": [1, 2], "d": True}),
        (['{"a": {"b": 1}}', "c=2"], {"a": {"b": 1}, "c": 2}),
        (["options.yml"], {"a": 1, "b": [1, 2]}),
        (["options.json", "a=2"], {"a": 2}),
    ],
)
def test_config_is_a_file_an_object_or_pairs(tmp_path, monkeypatch, given, config):
    monkeypatch.chdir(tmp_path)
    Path("options.yml").write_text("a: 1\nb: [1, 2]\n")
    Path("options.json").write_text('{"a": 1}')
    assert read_config(given) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.json", "--config none.json: cannot be read: No such file or directory"),
        ("list.json", "--config list.json: holds no options"),
        ("broken.yml", "--config broken.yml: "),
        ('{"a": ', '--config {"a": : '),
    ],
)
def test_a_config_that_holds_none_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("broken.yml").write_text("a: [1")
    with pytest.raises(OptionError) as caught:
        read_config([text])
    assert str(caught.value).startswith(message)


def test_the_artifact_names_the_file_it_came_from(here):
    torch.save(tiny().state_dict(), "weights.pt")
    assert main(["export", "weights.pt", *MODULE, "-o", "tiny.onnx"]) == 0
    source = artifact.read(here / "tiny.onnx").metadata["source"]
    assert source["file"] == "weights.pt"
    assert source["sha256"] == hashlib.sha256(Path("weights.pt").read_bytes()).hexdigest()
    assert str(here) not in json.dumps(source)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ([], [*MODULE, "--preset", "church-256"], "--preset is not for --module"),
        ([], [*MODULE, "--inputs", "x,t"], "--inputs is not for --module"),
        (["weights.pt"], ["--predicts", "v"], "--predicts is not for a checkpoint, whose family knows"),
        (["weights.pt"], ["--unit-data"], "--unit-data is not for a checkpoint, whose family knows"),
        (["OWN"], ["--dynamic"], "--dynamic is not for one of our artifacts"),
        (["OWN"], ["--size", "32"], "--size is not for one of our artifacts"),
        (["OWN"], ["--class-label", "3"], "--class-label is not for one of our artifacts"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(here, own, capsys, source, flags, message):
    torch.save(tiny().state_dict(), "weights.pt")
    named = [str(own) if name == "OWN" else name for name in source]
    assert main(["export", *named, *flags, "-o", "out.onnx"]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_nothing_to_export_and_nowhere_to_write_are_usage_errors(capsys):
    assert main(["export", "-o", "out.onnx"]) == 2
    assert "error: nothing to export" in capsys.readouterr().err
    assert main(["export", "model.ckpt"]) == 2
    assert "error: no file to write" in capsys.readouterr().err


# --- what passes at one size or batch and fails at another ---------------------------------------------------------


class FrozenBatch(nn.Module):
    def forward(self, x, label):
        return x.reshape(int(x.shape[0]), 3, 16, 16)


class FrozenSize(nn.Module):
    def forward(self, x, label):
        return x * (int(x.shape[2]) / 16)


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 3, 16, 16))

    def forward(self, x, label):
        return x * self.position


class CastsInside(nn.Module):
    def forward(self, x, label):
        return torch.sigmoid(x.float()) * label.float()[:, None, None, None] / 1000


def test_a_graph_with_a_frozen_batch_is_not_written(tmp_path):
    with pytest.raises(sdedit.SdeditError):
        export_denoiser(FrozenBatch(), tmp_path / "net.onnx", sde="linear", size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("net", [FrozenSize(), OneSize()])
def test_a_dynamic_graph_is_tried_at_another_size(net, tmp_path):
    export_denoiser(net, tmp_path / "fixed.onnx", sde="linear", size=16)
    with pytest.raises((OptionError, OutOfTolerance), match=r"18x17|tolerance"):
        export_denoiser(net, tmp_path / "free.onnx", sde="linear", size=16, dynamic=True)
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]


def test_a_network_that_casts_to_float32_inside_is_compared_in_float32(tmp_path):
    assert export_denoiser(CastsInside(), tmp_path / "net.onnx", sde="linear", size=16).within


class InPlace(nn.Module):
    """Changes its input, as a first line that shifts the data range does."""

    def forward(self, x, label):
        return x.mul_(0.5).add_(0.5).sin()


@pytest.mark.parametrize("convention", [{"sde": "ve:sigma_min=0.02,sigma_max=50"}, {"sde": "edm", "predicts": "eps"}])
def test_a_network_may_change_its_input(convention, tmp_path):
    assert export_denoiser(InPlace(), tmp_path / "net.onnx", size=16, **{"predicts": "eps"} | convention).within
    x, sigma = inputs(3.0)
    expected = x - 3 * np.sin(0.5 * x + 0.5)
    np.testing.assert_allclose(run_artifact(tmp_path / "net.onnx", x, sigma), expected, atol=1e-5)


class Experts(nn.Module):
    """One for high noise levels, one for low ones, by the first image's."""

    def forward(self, x, label):
        return x.sin() if label[0] < 600 else x.cos()


def test_a_choice_that_a_trace_freezes_is_out_of_tolerance(tmp_path):
    with pytest.raises(OutOfTolerance, match="not written"):
        export_denoiser(Experts(), tmp_path / "net.onnx", sde="linear", size=16)
    assert list(tmp_path.iterdir()) == []


class Table(nn.Module):
    """Looks its label up."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Embedding(1000, 3)

    def forward(self, x, label):
        return x * self.levels(label.long())[:, :, None, None]


@pytest.mark.parametrize("sde", ["linear", "cosine", "linear:steps=500"])
def test_a_table_of_levels_is_exported(sde, tmp_path):
    assert export_denoiser(Table(), tmp_path / "net.onnx", sde=sde, size=16, round_time=True).within


class NoLevel(nn.Module):
    def forward(self, x, label):
        return x.tanh()


def test_a_denoiser_that_ignores_its_level_has_the_input_all_the_same(tmp_path):
    assert export_denoiser(NoLevel(), tmp_path / "net.onnx", sde="edm", predicts="denoiser", size=16).within
    x, sigma = inputs(2.0)
    np.testing.assert_allclose(run_artifact(tmp_path / "net.onnx", x, sigma), np.tanh(x), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"sigma_data": 0.0}, {"sigma_data": -1.0}, {"time_scale": float("nan")}])
def test_a_convention_has_numbers_that_make_sense(wrong, tmp_path):
    with pytest.raises(OptionError, match="wanted a"):
        export_denoiser(tiny(), tmp_path / "net.onnx", sde="edm", predicts="edm", size=16, **wrong)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x.double(), "returned torch.float64; wanted torch.float32"),
        (lambda x: (x,), "returned tuple; wanted [2, 3, 16, 16]"),
        (lambda x: x[:, :2], "returned [2, 2, 16, 16]; wanted [2, 3, 16, 16]"),
        (lambda x: x[:, :, :8], "returned [2, 3, 8, 16]; wanted [2, 3, 16, 16]"),
        (lambda x: x @ x[0, 0, 0], "returned [2, 3, 16]; wanted"),
        (lambda x: {}["key"], "raised KeyError: 'key'"),
    ],
)
def test_a_module_that_is_no_denoiser_is_one_clear_error(returned, message, tmp_path):
    class Net(nn.Module):
        def forward(self, x, label):
            return returned(x)

    with pytest.raises(OptionError) as caught:
        export_denoiser(Net(), tmp_path / "net.onnx", sde="linear", size=16)
    assert str(caught.value).startswith("net(x [2, 3, 16, 16], label [2]) ")
    assert message in str(caught.value)


def test_an_inaccurate_artifact_stays_marked(tmp_path):
    export_denoiser(Forgetful(), tmp_path / "bad.onnx", sde="linear", size=16, allow_inaccurate=True)
    assert main(["export", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "again.onnx")]) == 0
    metadata = artifact.read(tmp_path / "again.onnx").metadata
    assert metadata["verification"]["within"] is False
    assert metadata["source"]["exported_from"]["precision"] == "fp32"


def test_tensors_that_claim_more_than_the_file_holds_are_refused(here, capsys):
    claimed = {name: torch.zeros(1).expand(t.shape) for name, t in tiny().state_dict().items()}
    torch.save(claimed, "thin.pt")
    assert main(["export", "thin.pt", *MODULE, "-o", "tiny.onnx"]) == 1
    assert "inner.weight is declared larger than what the file holds of it" in capsys.readouterr().err


def test_a_compressed_or_self_containing_checkpoint_is_refused(here, capsys):
    torch.save(tiny().state_dict(), "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert main(["export", "small.pt", *MODULE, "-o", "tiny.onnx"]) == 1
    assert "small.pt: is compressed" in capsys.readouterr().err
    loop: list = []
    loop.append(loop)
    torch.save({"a": loop}, "loop.pt")
    assert main(["export", "loop.pt", "-o", "tiny.onnx"]) == 1
    assert "lie too deep, or in themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "0"], "argument --size: '0' is not a whole number above 0"),
        (["--size", "1000000"], "size is 1000000x1000000; more than"),
        (["--sde", "linear:steps=1"], "--sde linear:steps=1: steps is 1; wanted a whole number from 2 to 100000"),
        (["--sde", "cosine:steps=1e9"], "--sde cosine:steps=1e9: steps is 1e+09; wanted"),
        (["-o", ""], "an artifact's name ends in .onnx"),
    ],
)
def test_numbers_beyond_reason_are_refused(here, capsys, flags, message):
    with contextlib.suppress(SystemExit):
        assert main(["export", *MODULE, "-o", "tiny.onnx", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1.5", "nan", "1e30"])
def test_a_constant_that_its_type_cannot_hold_is_refused(foreign, tmp_path, capsys, value):
    flags = ["--sde", "linear", "--inputs", "noisy,step", "--constant", f"kind={value}", "-o", str(tmp_path / "o.onnx")]
    assert main(["export", foreign[1], *flags]) == 2
    assert "input 'kind' is int64 and cannot be" in capsys.readouterr().err
