"""--fast takes the fastest execution that computes the same network, and finds out once."""

import json
from dataclasses import replace

import numpy as np
import pytest
from closed_form import SDES, gaussian
from conftest import SHAPE
from PIL import Image

import sdedit
from sdedit import artifact, companions, fastest
from sdedit.cli.main import main

MEAN = np.random.default_rng(1).uniform(-0.5, 0.5, SHAPE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastest"


@pytest.fixture
def folder(tmp_path):
    """right.onnx; int8.onnx made of it, off by 1 %; wrong.onnx, which says so too, off by 30 %; a stranger."""

    def write(name, std, mean=MEAN, **described):
        return gaussian(tmp_path / name, SDES["vp"], mean, std, **described)[0]

    sha256 = artifact.read(write("right.onnx", 0.5)).sha256
    made = {"source": {"exported_from": {"sha256": "0" * 64, "exported_from": {"sha256": sha256}}}}
    write("int8.onnx", 0.5 * 1.005, precision="int8", **made)
    write("wrong.onnx", 0.5 * 1.3, precision="int8", **made)
    write("stranger.onnx", 0.5, precision="int8")
    (tmp_path / "half.onnx").write_bytes((tmp_path / "int8.onnx").read_bytes()[:99])
    return tmp_path


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by file, or by file and backend: what the clock says. Others do not run."""
    told = {}

    def timed(trial, model, threads):
        return replace(trial, evaluation_ms=told.get((trial.file, trial.backend), told.get(trial.file)))

    monkeypatch.setattr(fastest, "_timed", timed)
    return told


def opened(folder, **options):
    editor = sdedit.load(folder / "right.onnx", fast=True, **{"backend": "ort-cpu"} | options)
    return editor.artifact.path.name, editor.backend.precision


def test_the_fastest_that_is_the_same_function_is_taken(folder, times):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0, "wrong.onnx": 1.0, "stranger.onnx": 1.0}
    assert opened(folder) == ("int8.onnx", "int8")


def test_a_few_percent_are_no_reason_to_leave_what_auto_takes(folder, times):
    times |= {"right.onnx": 5.2, "int8.onnx": 5.0}
    assert opened(folder) == ("right.onnx", "fp32")


def test_what_was_disturbed_once_is_timed_again(folder, monkeypatch):
    said = {"right.onnx": [6.0, 6.0, 9.0], "int8.onnx": [9.0, 5.0, 9.0], "wrong.onnx": [99.0, 1.0, 1.0]}

    def timed(trial, model, threads):
        return replace(trial, evaluation_ms=said[trial.file].pop(0))

    monkeypatch.setattr(fastest, "_timed", timed)
    assert opened(folder) == ("int8.onnx", "int8")
    assert said == {"right.onnx": [], "int8.onnx": [], "wrong.onnx": [1.0, 1.0]}  # nobody near it was that slow


def test_what_does_not_run_is_passed_over(folder, times):
    times |= {"int8.onnx": None, "right.onnx": 9.0}
    assert opened(folder) == ("right.onnx", "fp32")
    times["right.onnx"] = None
    with pytest.raises(sdedit.BackendUnavailable, match="nothing that runs closed-form here passed verification"):
        opened(folder, threads=1)


def test_precision_and_backend_narrow_the_choice(folder, times):
    times |= {"right.onnx": 1.0, "int8.onnx": 5.0}
    assert opened(folder, precision="int8") == ("int8.onnx", "int8")
    with pytest.raises(sdedit.BackendUnavailable, match="tensorrt"):
        opened(folder, backend="tensorrt")
    with pytest.raises(sdedit.OptionError, match="unknown backend"):
        opened(folder, backend="toaster")


def test_among_backends_the_faster_one_is_taken(folder, times):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    times |= {("right.onnx", "ort-cpu"): 9.0, ("right.onnx", "openvino"): 5.0}
    assert sdedit.load(folder / "right.onnx", fast=True).backend.name == "openvino"


def test_the_choice_is_looked_for_once_on_a_machine(folder, times, monkeypatch):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0}
    first = opened(folder)
    monkeypatch.setattr(fastest, "_try_all", lambda *_: pytest.fail("looked for again"))
    assert opened(folder) == first


def test_what_was_found_of_a_file_that_is_no_longer_there_is_not_kept(folder, times, cache, monkeypatch):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0}
    verified = fastest._verified

    def replaced(*given):
        (folder / "wrong.onnx").touch()
        return verified(*given)

    monkeypatch.setattr(fastest, "_verified", replaced)
    with pytest.raises(sdedit.ArtifactError, match=r"wrong\.onnx: was changed since it was read"):
        opened(folder)
    assert not cache.exists()


def test_what_the_search_took_is_told_once(folder, times):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0}
    first, later = (sdedit.load(folder / "right.onnx", fast=True, backend="ort-cpu").search_ms for _ in range(2))
    assert first > 0
    assert later == 0


CHANGES = {
    "threads": lambda patch, folder: {"threads": 1},
    "another cpu": lambda patch, folder: patch.setattr(fastest.cpu, "identity", lambda: ["flags: none"]),
    "another version": lambda patch, folder: patch.setattr(fastest, "_version", lambda package: "99"),
    "fewer cores": lambda patch, folder: patch.setattr(fastest, "usable_cores", lambda: 99),
    "a companion went": lambda patch, folder: (folder / "wrong.onnx").unlink(),
    "stricter": lambda patch, folder: patch.setitem(sdedit.verify.TOLERANCES, "int8", 1e-6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_looked_for_again_when_anything_it_depends_on_changes(change, folder, times, monkeypatch):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0}
    opened(folder)
    times["int8.onnx"] = None
    assert opened(folder, **CHANGES[change](monkeypatch, folder) or {}) == ("right.onnx", "fp32")


DAMAGES = {
    "torn": lambda text: text[:-40],
    "empty": lambda text: "",
    "endless": lambda text: "[" * 100_000,
    "another time": lambda text: text.replace('"evaluation_ms": 5.0', '"evaluation_ms": 50.0'),
    "another machine's": lambda text: text.replace('"cores": ', '"cores": 1'),
    "other fields": lambda text: text.replace('"trials"', '"tries"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_kept_is_used_whole_or_not_at_all(damage, folder, times, cache, monkeypatch):
    times |= {"right.onnx": 9.0, "int8.onnx": 5.0}
    opened(folder)
    (file,) = cache.iterdir()
    file.write_text(DAMAGES[damage](file.read_text()))
    assert opened(folder) == ("int8.onnx", "int8")
    monkeypatch.setattr(fastest, "_try_all", lambda *_: pytest.fail("looked for again, though it was mended"))
    assert opened(folder) == ("int8.onnx", "int8")
    assert [file] == list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(folder, times, cache, tmp_path):
    times |= {"right.onnx": 9.0}
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert opened(folder) == ("right.onnx", "fp32")


def test_it_starts_from_a_float32_artifact(folder):
    with pytest.raises(sdedit.OptionError, match=r"int8\.onnx is int8; the fastest execution is looked for from fp32"):
        sdedit.load(folder / "int8.onnx", fast=True)
    with pytest.raises(sdedit.OptionError, match="a plan is one execution"):
        sdedit.load(folder / "right.plan", fast=True)


def test_companions_are_known_by_their_content(folder):
    found = companions.companions(artifact.read(folder / "right.onnx"))
    assert [one.path.name for one in found] == ["int8.onnx", "wrong.onnx"]


def test_exports_of_one_checkpoint_are_companions_of_each_other(tmp_path):
    for name, sha256, onnx in (("a", "1" * 64, "1.19"), ("b", "1" * 64, "1.20"), ("c", "2" * 64, "1.19")):
        source = {"family": "ddpm", "weights": "ema", "sha256": sha256, "onnx": onnx}
        gaussian(tmp_path / f"{name}.onnx", SDES["vp"], MEAN, 0.5, source=source)
    found = companions.companions(artifact.read(tmp_path / "a.onnx"))
    assert [one.path.name for one in found] == ["b.onnx"]


def test_an_edit_says_what_it_took_and_its_record_replays_by_the_file_that_was_named(
    folder, write_png, picture, capsys
):
    guide, made, again = str(write_png("guide.png", picture(12, 8))), folder / "made.png", folder / "again.png"
    named = ["edit", guide, "-m", str(folder / "right.onnx")]
    assert main([*named, "--fast", "--precision", "int8", "--steps", "2", "--threads", "1", "-o", str(made)]) == 0
    said = capsys.readouterr()
    assert "fast: first use of closed-form on this machine" in said.err
    assert said.err.splitlines()[-1].startswith("fast: ")
    assert "int8 (int8.onnx)" in said.err.splitlines()[-1]
    record = json.loads(Image.open(made).info["sdedit"])
    assert record["backend"]["precision"] == "int8"
    assert record["artifact"]["sha256"] == artifact.read(folder / "int8.onnx").sha256
    assert main([*named, "--replay", str(made), "-o", str(again)]) == 0
    assert made.read_bytes() == again.read_bytes()
    assert main([*named, "--replay", str(made), "--fast", "-o", str(folder / "third.png")]) == 2
    assert "not from --fast" in capsys.readouterr().err


def test_what_was_opened_to_look_is_closed_again(folder, monkeypatch):
    opened_there = []

    def spied(*given, **named):
        opened_there.append(open_backend(*given, **named))
        opened_there[-1].close = lambda made=opened_there[-1]: closed.append(made)
        return opened_there[-1]

    closed, open_backend = [], fastest.open_backend
    monkeypatch.setattr(fastest, "open_backend", spied)
    editor = sdedit.load(folder / "right.onnx", fast=True, backend="ort-cpu")
    assert len(opened_there) > 4  # timed several times, verified, and compared with
    assert sorted(map(id, closed)) == sorted(map(id, opened_there[:-1]))
    assert editor.backend is opened_there[-1]


@pytest.mark.parametrize("load", [0.0, 99.0])
def test_a_choice_made_beside_other_work_is_said_to_be_one(folder, times, cache, monkeypatch, caplog, load):
    caplog.set_level("INFO", "sdedit")
    monkeypatch.setattr(fastest.os, "getloadavg", lambda: (load, 0, 0))
    times["right.onnx"] = 9.0
    for _ in range(2):
        opened(folder)
    said = [record.message for record in caplog.records if "other work" in record.message]
    assert len(said) == (load > 0)
    assert all(str(next(cache.iterdir())) in line for line in said)
