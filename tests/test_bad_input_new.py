"""Wrong input to the commands of later days: told as test_bad_input.py demands it, and nothing changed on disk."""

import argparse
import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from closed_form import SDES, gaussian
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageCms
from test_bad_input import Ran, complaints, files, posix

import sdedit
from sdedit import artifact, fastest
from sdedit.bench import Bench, Effort, expand
from sdedit.cli.main import main
from sdedit.cli.repeat import command_line
from sdedit.opinions import a_is_left

SHAPE = (3, 16, 16)
Run = Callable[[str], Ran]
Refused = Callable[[str, int, str], None]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with model.onnx, guide.png and mask.png, in which commands run."""
    monkeypatch.delenv("SDEDIT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    gaussian(Path("model.onnx"), SDES["vp"], np.zeros(SHAPE), 0.5)
    picture(Path("guide.png"))
    Image.fromarray(np.pad(np.full((6, 6), 255, np.uint8), 5)).save("mask.png")


def picture(path: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    with open(path, "wb") as file:  # by a file, since Pillow does not take every name
        Image.fromarray(pixels).save(file, "PNG")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(words: str) -> Ran:
        capfd.readouterr()
        try:
            code = main(["" if word == "''" else word for word in words.split()])
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Refused:
    """Run a command that must be refused: its words, the code, and a part of the error line."""

    def refused(words: str, code: int, text: str) -> None:
        before = files(tmp_path)
        ran = run(words)
        assert complaints(ran) == []
        assert (ran.code, ran.out) == (code, ""), ran.err
        assert text in ran.err.splitlines()[-2]
        assert files(tmp_path) == before

    return refused


EDIT = "edit guide.png -m model.onnx --threads 1 --steps 2 -o out.png"


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        ("model.onnx", "model.onnx: not a picture, or of an unknown format"),
        (".", ".: is a folder, not a picture"),
    ],
)
def test_a_guide_that_is_none_is_told_the_same_way_with_a_budget(refused: Refused, guide: str, text: str) -> None:
    refused(EDIT.replace("guide.png", guide) + " --mask mask.png --max-ms 1e6", 1, text)


def test_fast_says_that_there_is_no_export_of_the_precision(refused: Refused) -> None:
    refused(f"{EDIT} --fast --precision int8", 1, "nothing here runs closed-form in int8")
    refused(f"{EDIT} --fast --precision double", 2, "unknown precision 'double'")


def test_a_region_that_a_model_cannot_have_is_told(run: Run) -> None:
    ran = run(f"{EDIT} --mask mask.png --region auto")
    assert ran.code == 0
    assert "region auto: closed-form has one size here, so its whole frame was run" in ran.err
    ran = run(f"{EDIT} --force --region auto")
    assert ran.code == 0
    assert "region auto: there is no mask, so the whole frame was run" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        "batch '' -o out",
        "batch in -o ''",
        "batch in -o out --masks ''",
        "inspect ''",
        "tune ''",
        "evaluate --guides ''",
    ],
)
def test_an_empty_name_is_not_the_current_folder(refused: Refused, words: str) -> None:
    refused(words, 2, "is empty")


def closed() -> Image.Image:
    opened = Image.new("RGB", (16, 16))
    opened.close()
    return opened


ARRAY = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        ({"guides": Image.new("RGB", (0, 5))}, sdedit.ImageError, r"the guide: has no pixels \(0x5\)"),
        ({"mask": Image.new("L", (5, 0))}, sdedit.ImageError, r"the mask: has no pixels \(5x0\)"),
        ({"guides": closed()}, sdedit.ImageError, "the guide: cannot be decoded"),
        ({"guides": [ARRAY, ARRAY], "mask": [None, ARRAY], "batch": 2}, sdedit.OptionError, "one of the masks is None"),
        ({"mask": ARRAY[:5]}, sdedit.ImageError, "the mask: is 16x5; the guide is 16x16"),
        ({"conditions": {1: 2}}, sdedit.OptionError, "conditions names 1; wanted a word"),
        ({"on_step": 3}, sdedit.OptionError, "on_step is 3; wanted a function"),
        ({"spent_ms": "x"}, sdedit.OptionError, "spent_ms is 'x'"),
    ],
)
def test_what_is_wrong_with_an_edit_in_python_is_told(edit: dict[str, Any], error: type, text: str) -> None:
    with sdedit.load("model.onnx") as editor, pytest.raises(error, match=text):
        editor.edit(**{"guides": ARRAY, "steps": 1} | edit)


@pytest.mark.parametrize(
    ("load", "error", "text"),
    [
        ({"backend": ["ort-cpu"]}, sdedit.OptionError, r"backend is \['ort-cpu'\]; wanted a name"),
        ({"model": 3}, sdedit.ArtifactError, "the model is 3; wanted a path"),
        ({"model": b"x"}, sdedit.ArtifactError, "the model is b'x'; wanted a path"),
        ({"model": ""}, sdedit.ArtifactError, "the model is ''; wanted a path"),
        ({"model": 3, "fast": True}, sdedit.ArtifactError, "the model is 3; wanted a path"),
    ],
)
def test_what_is_wrong_with_loading_in_python_is_told(load: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        sdedit.load(**{"model": "model.onnx"} | load)


@pytest.mark.parametrize("mode", ["La", "LAB", "YCbCr", "1"])
def test_pictures_of_rare_modes_are_read(mode: str) -> None:
    rare = Image.new(mode, (16, 16), tuple(255 for _ in Image.new(mode, (1, 1)).getbands()))
    with sdedit.load("model.onnx") as editor:
        assert editor.edit(rare, mask=rare, steps=1).x.shape == (1, *SHAPE)


@pytest.mark.parametrize("size", [(65536, 65536), (65536, 2000), (50243, 1334), (65, 63), (1, 1)])
def test_a_size_that_a_model_does_not_take_is_answered_with_one_that_it_does(size: tuple[int, int]) -> None:
    free = {"channels": 3, "height": 64, "width": 64, "dynamic": True, "multiple": 64}
    gaussian(Path("free.onnx"), SDES["vp"], np.zeros((3, 64, 64)), 0.5, image=free)
    model = artifact.read(Path("free.onnx"))
    with pytest.raises(sdedit.OptionError, match="size is {}x{}".format(*size)) as told:
        model.frame(size)
    width, height = map(int, told.value.hint.removeprefix("--size ").split("x"))
    assert model.frame((width, height)) == (width, height)


@posix
def test_a_pipe_in_a_folder_is_told_and_not_waited_for(run: Run) -> None:
    Path("in").mkdir()
    Path("out").mkdir()
    picture(Path("in/a.png"))
    os.mkfifo("in/z.png")
    ran = run("batch in -o out -m model.onnx --steps 1")
    assert ran.code == 1
    assert "in/z.png: is a pipe or a device" in ran.err
    assert Path("out/a.png").exists()


def test_a_picture_keeps_the_colour_profile_of_its_guide(run: Run) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open("guide.png").save("guide.png", icc_profile=profile)
    for words in (EDIT, f"{EDIT} --force --mask mask.png"):
        assert run(words).code == 0
        assert Image.open("out.png").info["icc_profile"] == profile
    with sdedit.load("model.onnx") as editor:
        (made,) = editor.edit("guide.png", steps=1).images
        assert made.info["icc_profile"] == profile
    Image.open("guide.png").save("guide.tif", icc_profile=profile + bytes(2**20))  # more than Pillow opens in a PNG
    ran = run(f"{EDIT.replace('guide.png', 'guide.tif')} --force")
    assert "guide.tif: its colour profile is too large to be kept" in ran.err
    assert "icc_profile" not in Image.open("out.png").info
    of_grey = profile[:16] + b"GRAY" + profile[20:]
    Image.open("guide.png").convert("L").save("grey.png", icc_profile=of_grey)
    assert run(f"{EDIT.replace('guide.png', 'grey.png')} --force").code == 0
    assert "icc_profile" not in Image.open("out.png").info


# --- evaluate --------------------------------------------------------------------------------------------------------


def network(path: str, inputs: int, *, axes: list[int], times: float = 1.0) -> None:
    """The mean over `axes` of the first input, times a number."""
    pictures = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["N", 3, "H", "W"]) for i in range(inputs)]
    nodes = [
        helper.make_node("ReduceMean", ["x0"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("Mul", ["mean", "times"], ["y"]),
    ]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(np.array(times, np.float32), "times")]
    graph = helper.make_graph(nodes, "g", pictures, [made], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def folders() -> None:
    for seed, folder in enumerate(("guides", "a", "b", "real")):
        Path(folder).mkdir()
        for number in range(4):
            picture(Path(folder, f"{number}.png"), 10 * seed + number)
    network("features.onnx", 1, axes=[2, 3])


KID = "evaluate --guides guides --methods a --real real --features features.onnx --subset-size 3 --subsets 2"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (f"{KID} --seed -1", "seed is -1; wanted a whole number from 0"),
        (f"{KID} --feature-input 99999999999:0:1", "size is 99999999999; wanted a whole number from 1 to 4096"),
        (f"{KID} --feature-input own:nan:1", "low is nan; wanted a number in"),
        (f"{KID} --feature-input own:0:inf", "high is inf; wanted a number in"),
        ("evaluate --guides guides --methods a --subset-size 5", "--subset-size without --features"),
        ("evaluate --guides guides --methods a --seed 5", "--seed without --features"),
        ("evaluate --pairs a b -o p.html --seed 9007199254740992", "seed is 9007199254740992; wanted a whole number"),
        ("evaluate --pairs a ./a -o p.html", "--pairs names a twice"),
        ("evaluate --answers a.json ./a.json", "a file of answers is named twice"),
    ],
)
def test_evaluate_refuses(folders: None, refused: Refused, words: str, text: str) -> None:
    refused(words, 2, text)


def test_what_kid_is_asked_for_is_checked_before_a_network_runs(
    folders: None, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdedit.features.FeatureNetwork.__call__", None)
    refused(f"{KID} --subsets 1", 2, "subsets is 1")


def test_networks_that_return_no_numbers_are_refused(folders: None, refused: Refused) -> None:
    network("scalar.onnx", 1, axes=[0, 1, 2, 3])
    refused(KID.replace("features.onnx", "scalar.onnx"), 1, "scalar.onnx: returned float32 () for 4 pictures")
    network("nan.onnx", 2, axes=[1, 2, 3], times=np.nan)
    refused("evaluate --guides guides --methods a --lpips nan.onnx --json", 1, "nan.onnx: returned NaN or Inf")


def test_every_column_of_a_table_has_a_name_of_its_own(folders: None, run: Run) -> None:
    network("lpips.onnx", 2, axes=[1, 2, 3])
    assert run("evaluate --guides guides --methods a --lpips lpips.onnx -o report.csv").code == 0
    with open("report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["lpips"]) == pytest.approx(0, abs=1)
    assert rows[1]["lpips_network"].startswith("name=lpips.onnx ")


def test_answers_that_nest_too_deep_are_none(refused: Refused) -> None:
    Path("deep.json").write_text("[" * 200_000)
    refused("evaluate --answers deep.json", 2, "deep.json: not answers of a page that --pairs wrote")


@posix
def test_names_that_are_not_unicode_are_shown_and_asked_about(run: Run) -> None:
    name = os.fsdecode(b"caf\xe9")
    for folder in ("guides", "a", "b"):
        Path(folder).mkdir()
        picture(Path(folder, f"{name}.png"), len(folder))
    ran = run("evaluate --guides guides --methods a b -o report.html")
    assert ran.code == 0, ran.err
    assert r"caf\udce9" in Path("report.html").read_text("utf-8")
    assert run("evaluate --pairs a b -o pairs.html").code == 0
    left = a_is_left(0, "realism", name)
    answer = {"question": "realism", "name": name, "chosen": "left" if left else "right"}
    Path("answers.json").write_text(json.dumps({"study": {"a": "a", "b": "b", "seed": 0}, "answers": [answer]}))
    told = run("evaluate --answers answers.json --json")
    assert json.loads(told.out)["preferences"][0]["share_a"] == 1


# --- tune ------------------------------------------------------------------------------------------------------------

TUNE = "tune guide.png -m model.onnx --threads 1 --steps 2 -n 1"


@pytest.mark.parametrize("given", ["--real .", "--features model.onnx"])
def test_tune_refuses_what_it_would_ignore(refused: Refused, given: str) -> None:
    refused(f"{TUNE} -o sheet.png {given}", 2, f"{given.split()[0]} without --realism")


def test_a_sheet_overwrites_no_real_picture(folders: None, refused: Refused) -> None:
    words = f"{TUNE} --realism 0.1 --real real --features features.onnx -o real/0.png --force"
    refused(words, 1, "real/0.png: would overwrite an input")


def test_questions_end_where_there_is_nobody_to_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # closed by the caller
    ran = run(f"{TUNE} --interactive -o sheet.png")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0] == "sheet.png"


@pytest.mark.parametrize("batch", ["", " --batch 1"])
def test_the_command_that_tune_prints_is_one(run: Run, batch: str) -> None:
    ran = run(f"{TUNE} --l2 5{batch}")
    assert ran.code == 0, ran.err
    assert run(ran.out.splitlines()[-1].removeprefix("sdedit ")).code == 0


def test_the_command_that_tune_prints_has_every_digit_of_a_condition() -> None:
    given = argparse.Namespace(fast=None, ep_option=None, set=[("label", 1234567.0), ("scale", 0.12345678)])
    assert command_line(["edit"], given) == "sdedit edit --set label=1234567 --set scale=0.12345678"


# --- from Python -----------------------------------------------------------------------------------------------------

PIXELS = np.zeros((16, 16, 3), np.uint8)


def test_a_tuner_takes_one_guide_as_an_edit_does() -> None:
    with sdedit.open_tuner(sdedit.load("model.onnx"), "guide.png", masks="mask.png", steps=2) as tuner:
        assert len(tuner.at([0.3])[0].pictures) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"masks": []}, "0 masks for 1 guides"),
        ({"t0s": 0}, "t0s is 0; wanted a whole number from 1"),
    ],
)
def test_a_tuner_refuses(options: dict[str, Any], text: str) -> None:
    with (
        pytest.raises(sdedit.OptionError, match=text),
        sdedit.open_tuner(sdedit.load("model.onnx"), [PIXELS], steps=2, **options),
    ):
        pass


@pytest.mark.parametrize(("measure", "text"), [("kid", "trials have no KID"), ("l3", "unknown measure 'l3'")])
def test_a_search_is_for_what_trials_have(measure: str, text: str) -> None:
    editor = sdedit.load("model.onnx")
    with sdedit.open_tuner(editor, [PIXELS], steps=2) as tuner, pytest.raises(sdedit.OptionError, match=text):
        sdedit.search_t0(tuner, measure, 1.0)


@pytest.mark.parametrize(
    "patch", [(0, 0, 4.5, 4), (0, 0, float("nan"), 4), (0, 0, 4, 4, (1.5, 2)), (0, 0, 4, 4, (1,)), ("0", 0, 4, 4)]
)
def test_patches_are_whole_pixels(patch: tuple[Any, ...]) -> None:
    with pytest.raises(sdedit.OptionError, match="wanted whole pixels"):
        sdedit.compose(PIXELS, [sdedit.Patch(PIXELS, *patch)])


def test_a_model_may_be_a_path_in_a_benchmark() -> None:
    bench = Bench(expand([Path("model.onnx")], {"steps": [1], "threads": [1]}), Effort(runs=1, rounds=1))
    assert list(bench.visits()) == [1, 2]


def test_kid_has_the_seeds_that_edits_have() -> None:
    features = np.eye(4)
    with pytest.raises(sdedit.OptionError, match="seed is -1; wanted a whole number"):
        sdedit.kid(features, features, subset_size=3, seed=-1)


# --- serve, doctor, and one object for --json ------------------------------------------------------------------------

SERVE = [sys.executable, "-m", "sdedit.cli.main", "serve", "-m", "model.onnx", "--threads", "1"]


def test_a_service_loads_its_model_as_an_edit_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, given = sdedit.load("model.onnx"), {}
    monkeypatch.setattr(sdedit, "load", lambda model, **options: given.update(options) or editor)
    monkeypatch.setattr("sdedit.serve.server.run", lambda *_: None)
    assert run("serve -m model.onnx --port 0 --fast --precision bf16 --backend openvino").code == 0
    assert (given["fast"], given["precision"], given["backend"]) == (True, "bf16", "openvino")


@posix
def test_a_service_whose_caller_has_left_ends() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([*SERVE, "--port", "0"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(write)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr


@posix
def test_a_service_needs_no_stdout() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *SERVE, "--socket", "s"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
        try:
            until = time.monotonic() + 30
            while b" 200 " not in ready("s") and service.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            service.terminate()
        said = service.communicate(timeout=30)[1]
    assert service.returncode == 0, said
    assert "Traceback" not in said


def ready(path: str) -> bytes:
    """The first line that a service on a Unix socket answers to GET /readyz."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        try:
            opened.connect(path)
            opened.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            return opened.recv(100).partition(b"\r\n")[0]
        except OSError:
            return b""


def test_doctor_shows_every_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDEDIT_CACHE", "cache")
    monkeypatch.setattr("sdedit.cli.doctor.try_backend", lambda name: {"name": name, "works": True})
    assert run(f"{EDIT} --fast").code == 0
    told = json.loads(run("doctor --json").out)
    assert told["fastest_cache"]["folder"] == str(Path("cache", "fastest"))
    assert told["fastest_cache"]["entries"] == 1
    assert told["fastest_cache"]["bytes"] > 0
    assert told["graphs_cache"]["entries"] == 0
    assert re.search(r"^what --fast found\n  cache/fastest: 1 entries", run("doctor").out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("strokes guide.png -o s.png", {"outputs": ["s.png"]}),
        ("compose guide.png --patch guide.png@0,0,4,4:8,8 -o c.png", {"guide": "c.png", "mask": None, "notes": []}),
    ],
)
def test_json_is_one_object(run: Run, words: str, told: dict[str, Any]) -> None:
    ran = run(f"{words} --json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == told


def test_a_user_without_a_home_goes_without_caches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDEDIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("sdedit.cli.doctor.try_backend", lambda name: {"name": name, "works": True})
    ran = run(f"{EDIT} --fast")
    assert ran.code == 0
    assert "fast: what was found is not kept: Not a directory; SDEDIT_CACHE names another folder" in ran.err
    assert run("doctor").code == 0


def test_a_budget_is_checked_before_a_search_and_does_not_count_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDEDIT_CACHE", "cache")
    refused = run(f"{EDIT} --fast --max-ms -5")
    assert refused.err.startswith("error: max_ms is -5.0; wanted milliseconds, above 0 and at most 1e+12\n")
    open_fastest = fastest.open_fastest
    monkeypatch.setattr(fastest, "open_fastest", lambda *given, **named: (*open_fastest(*given, **named)[:2], 1e6))
    monkeypatch.setattr("sdedit.cli.budget.since_start_ms", lambda: 1e6 + 5)
    ran = run(f"{EDIT} --fast --max-ms 60000")
    assert ran.code == 0
    assert "\nbudget: the search of --fast took 1000000 ms beside it, which later runs will not\n" in ran.err
    assert "\nbudget: 2 of 2 steps in 60000 ms" in ran.err
