"""`sdedit batch`: a folder of pictures, each as if it had been edited alone, whatever happens on the way."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from closed_form import SDES, metadata, save
from onnx import helper
from PIL import Image

import sdedit
from sdedit import record
from sdedit.cli.main import main
from sdedit.file_edits import FileEdits
from sdedit.places import LocalPlace

NAMES = ("a.png", "b/c.jpg", "b/d.PNG", "b/e/f.webp", "g.bmp", "h.tif", "ü.png")


@pytest.fixture
def guides(tmp_path, picture):
    return fill(tmp_path / "in", picture, NAMES)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def batch(network):
    """batch(IN, OUT, *flags) -> exit code: the network model, 2 steps on the CPU, 3 pictures a batch."""

    def run(guides: Path, out: Path, *flags: object, model: Path = network) -> int:
        return main([str(word) for word in command(guides, out, model, *flags)])

    return run


def command(guides: Path, out: Path, model: Path, *flags: object) -> list[str]:
    given = [str(flag) for flag in flags]
    usual = {"--steps": "2", "--backend": "ort-cpu", "--threads": "1", "--batch": "3"}
    rest = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
    return ["batch", str(guides), "-o", str(out), "-m", str(model), *given, *rest]


def fill(root: Path, picture, names) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(20 + number, 11, number)).save(root / name)
    return root


def written(out: Path) -> dict[str, bytes]:
    """Every file below a folder but the manifest."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != "manifest.jsonl")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def noted(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def seed_of(name: str, seed: int = 0) -> int:
    return (seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")) % 2**64


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- results -----------------------------------------------------------------------------------------------------


def test_every_picture_is_edited_under_its_own_name(batch, guides, out, capsys):
    (guides / "notes.txt").write_text("not a picture")
    assert batch(guides, out) == 0
    assert sorted(written(out)) == sorted(str(Path(name).with_suffix(".png")) for name in NAMES)
    said = capsys.readouterr()
    assert said.out == f"7 edited, 0 done before, 0 failed: {out / 'manifest.jsonl'}\n"
    assert said.err == ""


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_result_is_what_edit_makes_with_its_seed(size, batch, guides, out, editor):
    assert batch(guides, out, "--seed", 2**64 - 5, "--batch", size, "--t0", 0.7, "--sampler", "ddim", "--eta", 1) == 0
    for name in NAMES:
        options = {"t0": 0.7, "steps": 2, "sampler": "ddim", "eta": 1, "batch": size}
        (alone,) = editor.edit(guides / name, seed=seed_of(name, 2**64 - 5), **options).results
        with Image.open((out / name).with_suffix(".png")) as made:
            assert np.array_equal(np.asarray(made), alone.pixels)


def test_one_at_a_time_is_byte_for_byte_what_the_edit_command_writes(batch, guides, out, network, tmp_path):
    assert batch(guides, out, "--batch", 1) == 0
    usual = ("--steps", "2", "--backend", "ort-cpu", "--threads", "1", "-m", str(network))
    for name in NAMES:
        alone = tmp_path / "alone.png"
        seed = str(seed_of(name))
        assert main(["edit", str(guides / name), "-o", str(alone), "--force", "--seed", seed, *usual]) == 0
        assert (out / name).with_suffix(".png").read_bytes() == alone.read_bytes()


def test_without_a_batch_size_it_is_the_backends_usual_one(guides, out, editor):
    assert sdedit.edit_folder(editor, guides, out, steps=1).options.batch == editor.backend.usual_batch > 1
    assert {entry["options"]["batch"] for entry in noted(out)} == {editor.backend.usual_batch}


def test_a_result_does_not_depend_on_its_neighbours(batch, guides, out, tmp_path):
    assert batch(guides, out) == 0
    (guides / "a.png").unlink()
    (guides / "b" / "c.jpg").unlink()
    (tmp_path / "fewer").mkdir()
    assert batch(guides, tmp_path / "fewer", "--workers", 1) == 0
    fewer = written(tmp_path / "fewer")
    assert len(fewer) == len(NAMES) - 2
    assert fewer.items() <= written(out).items()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 9, 11, 12])
def test_a_picture_comes_out_the_same_in_every_place_of_a_batch(size, tmp_path):
    nodes = [helper.make_node("Log", ["sigma"], ["level"]),  # by four ONNX Runtime takes another logarithm
             helper.make_node("Reshape", ["level", "column"], ["levels"]),
             helper.make_node("Mul", ["x", "levels"], ["denoised"])]  # fmt: skip
    column = {"column": np.array([-1, 1, 1, 1])}
    path = save(tmp_path / "log.onnx", nodes, column, metadata((3, 4, 4), SDES["vp"]), shape=(3, 4, 4))
    network = sdedit.load(path, backend="ort-cpu").backend.bind(size, {})
    x = np.ones((size, 3, 4, 4), np.float32)
    for sigma in np.geomspace(0.01, 100, 500, dtype=np.float32):
        rows = network(x, np.full(size, sigma)).reshape(size, -1)
        assert (rows == rows[0]).all()


def test_a_result_can_be_replayed(batch, guides, out, network, tmp_path):
    assert batch(guides, out) == 0
    assert record.read(out / "b/c.png").options.batch == 3
    again = tmp_path / "again.png"
    assert main(["edit", "--replay", str(out / "b/c.png"), str(guides / "b/c.jpg"), "-m", str(network),
                 "-o", str(again)]) == 0  # fmt: skip
    assert again.read_bytes() == (out / "b/c.png").read_bytes()


def test_the_manifest_says_what_was_done(batch, guides, out, network):
    assert batch(guides, out, "--seed", 9) == 0
    entries = noted(out)
    assert [entry["path"] for entry in entries] == sorted(NAMES)
    for entry in entries:
        assert entry["status"] == "done"
        assert entry["output"] == str(Path(entry["path"]).with_suffix(".png"))
        assert entry["seed"] == seed_of(entry["path"], 9)
        assert entry["guide_sha256"] == sha256(guides / entry["path"])
        assert entry["mask_sha256"] is None
        assert entry["output_sha256"] == sha256(out / entry["output"])
        assert entry["artifact_sha256"] == sha256(network)
        assert entry["options"].items() >= {"steps": 2, "t0": 0.5, "seed": 9, "batch": 3}.items()


def test_json_is_one_object(batch, guides, out, capsys):
    assert batch(guides, out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["edited"], said["kept"], said["failed"]) == (7, 0, {})
    assert said["options"]["steps"] == 2


# --- masks -------------------------------------------------------------------------------------------------------


def test_masks_go_by_their_guides_names(batch, guides, out, tmp_path, editor):
    for name in NAMES:
        with Image.open(guides / name) as guide:
            mask = Image.fromarray(np.eye(guide.height, guide.width, dtype=np.uint8) * 255)
        target = tmp_path / "masks" / (name if name == "g.bmp" else Path(name).with_suffix(".png"))
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(target)
    (tmp_path / "masks" / "a.png").unlink()
    assert batch(guides, out, "--masks", tmp_path / "masks", "--fit", "pad") == 1
    done = {entry["path"]: entry for entry in noted(out)}
    assert [name for name, entry in done.items() if entry["status"] == "failed"] == ["a.png"]
    assert "no such mask" in done["a.png"]["error"]
    for name, mask in (("b/c.jpg", "b/c.png"), ("g.bmp", "g.bmp")):
        given = {"mask": tmp_path / "masks" / mask, "seed": seed_of(name), "steps": 2, "fit": "pad", "batch": 3}
        (alone,) = editor.edit(guides / name, **given).results
        with Image.open((out / name).with_suffix(".png")) as made:
            assert np.array_equal(np.asarray(made), alone.pixels)
        assert done[name]["mask_sha256"] == sha256(tmp_path / "masks" / mask)


# --- bad files ---------------------------------------------------------------------------------------------------


def test_a_bad_file_is_reported_and_skipped_and_done_when_mended(batch, guides, out, picture, capsys):
    whole = (guides / "b" / "c.jpg").read_bytes()
    (guides / "b" / "c.jpg").write_bytes(whole[:60])
    assert batch(guides, out) == 1
    said = capsys.readouterr()
    first, *rest = said.err.splitlines()
    assert first.startswith(f"{guides / 'b' / 'c.jpg'}: ")
    assert rest == ["error: 1 of 7 pictures could not be edited", "hint: mend them and run the same command again"]
    assert len(written(out)) == 6
    (failed,) = (entry for entry in noted(out) if entry["status"] == "failed")
    assert failed["path"] == "b/c.jpg"
    assert failed["error"] in first

    (guides / "b" / "c.jpg").write_bytes(whole)
    assert batch(guides, out) == 0
    assert capsys.readouterr().out.startswith("1 edited, 6 done before, 0 failed")
    assert sorted(entry["path"] for entry in noted(out)) == sorted(NAMES)


def test_a_picture_that_the_network_cannot_do_leaves_its_batch_alone(guides, out, network, monkeypatch):
    editor = sdedit.load(network, backend="ort-cpu", threads=1)
    executor_run = sdedit.executor.HostExecutor.run

    def run(self, work, on_step):
        if seed_of("b/c.jpg") in work.seeds:
            raise sdedit.NetworkError("NaN in the network's answer", hint="another picture")
        return executor_run(self, work, on_step)

    monkeypatch.setattr(sdedit.executor.HostExecutor, "run", run)
    result = sdedit.edit_folder(editor, guides, out, steps=2, batch=3)
    assert list(result.failed) == ["b/c.jpg"]
    assert result.edited == len(written(out)) == 6


# --- interrupted and started again -------------------------------------------------------------------------------


def test_a_job_that_is_done_does_nothing(batch, guides, out, capsys):
    assert batch(guides, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    capsys.readouterr()
    assert batch(guides, out) == 0
    assert capsys.readouterr().out.startswith("0 edited, 7 done before, 0 failed")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before


@pytest.mark.parametrize(("kills", "images"), [(4, 120), pytest.param(20, 800, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_finishes_the_rest_and_nothing_twice(kills, images, batch, tmp_path, picture, network):
    guides = fill(tmp_path / "many", picture, [f"{n % 5}/{n:03d}.png" for n in range(images)])
    flags = ("--steps", 60)
    uninterrupted, folders = tmp_path / "whole", [tmp_path / "killed-0"]
    for folder in (uninterrupted, *folders):
        folder.mkdir()
    assert batch(guides, uninterrupted, *flags) == 0
    whole, lines = written(uninterrupted), sorted(entry["path"] for entry in noted(uninterrupted))

    def pictures():
        return sum(1 for _ in folders[-1].glob("[0-9]/*.png"))

    moments = random.Random(6)
    struck = runs = 0
    while struck < kills:  # runs that were killed with pictures left to do
        runs += 1
        assert runs < 10 * kills, "a run is done here before it can be killed: give it more pictures"
        had, words = pictures(), command(guides, folders[-1], network, *flags)
        with open(os.devnull, "w") as nowhere, subprocess.Popen(
            [sys.executable, "-m", "sdedit.cli.main", *words], stdout=nowhere, stderr=nowhere
        ) as running:  # fmt: skip
            deadline = time.monotonic() + 20
            while pictures() <= had and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            ran = running.poll() is None
            running.kill()
        if pictures() < images:
            assert ran, f"the run failed with {running.returncode}"
            struck += 1
        else:  # it was too fast: once more from the start
            folders.append(tmp_path / f"killed-{runs}")
            folders[-1].mkdir()
    for folder in folders:
        assert batch(guides, folder, *flags) == 0
        assert written(folder) == whole
        assert sorted(entry["path"] for entry in noted(folder)) == lines
        assert {entry["status"] for entry in noted(folder)} == {"done"}


def test_a_torn_last_line_is_ignored_and_repaired(batch, guides, out):
    assert batch(guides, out) == 0
    whole, lines = written(out), (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(lines[:-40])
    (out / "h.png").unlink()
    assert batch(guides, out) == 0
    assert written(out) == whole
    assert sorted((out / "manifest.jsonl").read_bytes().splitlines()) == sorted(lines.splitlines())


@pytest.mark.parametrize("change", ["guide", "output", "lost"])
def test_a_line_counts_only_while_guide_and_output_are_the_recorded_ones(change, batch, guides, out, picture, capsys):
    assert batch(guides, out) == 0
    first = written(out)
    if change == "guide":
        Image.fromarray(picture(20, 11, 99)).save(guides / "a.png")
    elif change == "output":
        (out / "a.png").write_bytes(b"something else")
    else:
        (out / "a.png").unlink()
    capsys.readouterr()
    assert batch(guides, out) == 0
    assert capsys.readouterr().out.startswith("1 edited, 6 done before, 0 failed")
    assert (written(out) == first) == (change != "guide")
    assert len(noted(out)) == 7


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--steps", 3), "steps 2; now it is 3"), (("--seed", 1), "seed 0; now it is 1"), (("--batch", 2), "batch 3")],
)
def test_other_options_are_refused_unless_it_starts_over(flags, said, batch, guides, out, capsys):
    assert batch(guides, out) == 0
    first = written(out)
    assert batch(guides, out, *flags) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.splitlines()[-1].endswith("or --force to start over")
    assert written(out) == first
    assert batch(guides, out, *flags, "--force") == 0
    assert len(noted(out)) == 7
    assert written(out).keys() == first.keys()
    assert written(out) != first


def test_another_model_is_refused(batch, guides, out, paint, capsys):
    assert batch(guides, out) == 0
    assert batch(guides, out, model=paint) == 1
    assert "was begun with artifact_sha256" in capsys.readouterr().err


# --- in the pipe -------------------------------------------------------------------------------------------------


def test_only_a_few_pictures_are_held_however_many_there_are(tmp_path, picture, network, out, monkeypatch):
    guides = fill(tmp_path / "many", picture, [f"{n}.png" for n in range(60)])
    editor = sdedit.load(network, backend="ort-cpu", threads=1)
    held, most, lock = 0, 0, threading.Lock()
    prepare, write = sdedit.Editor.prepare, FileEdits.write

    def counted_prepare(*arguments, **options):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return prepare(*arguments, **options)

    def counted_write(*arguments):
        nonlocal held
        time.sleep(0.005)  # a slow disk
        with lock:
            held -= 1
        return write(*arguments)

    monkeypatch.setattr(sdedit.Editor, "prepare", counted_prepare)
    monkeypatch.setattr(FileEdits, "write", counted_write)
    workers, size = 2, 4
    assert sdedit.edit_folder(editor, guides, out, workers=workers, batch=size, steps=1).edited == 60
    assert size < most <= 4 * size + workers


def test_progress_counts_every_file(guides, out, editor):
    (guides / "a.png").write_bytes(b"")
    seen = []
    result = sdedit.edit_folder(editor, guides, out, on_file=seen.append, steps=1, batch=3)
    assert [one.done for one in seen] == list(range(8))
    assert {one.total for one in seen} == {7}
    assert seen[0].path is None
    assert {one.path for one in seen[1:]} == set(NAMES)
    assert [one.path for one in seen if one.error] == list(result.failed) == ["a.png"]


# --- refused before any work -------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_when_forced(batch, guides, out, capsys):
    (out / "g.png").write_bytes(b"precious")
    assert batch(guides, out) == 1
    assert capsys.readouterr().err.startswith(f"error: {out / 'g.png'}: exists already\nhint: ")
    assert written(out) == {"g.png": b"precious"}
    assert batch(guides, out) == 1  # the first try did not make it ours
    assert batch(guides, out, "--force") == 0
    assert len(written(out)) == 7


def test_folders_that_are_not_there_or_in_each_other_are_refused(batch, guides, out, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (guides / "results").mkdir()
    for arguments, message in (
        ((tmp_path / "none", out), f"{tmp_path / 'none'}: no such folder"),
        ((guides, tmp_path / "none"), f"{tmp_path / 'none'}: no such folder"),
        ((guides, out, "--masks", tmp_path / "none"), f"{tmp_path / 'none'}: no such folder"),
        ((tmp_path / "empty", out), f"{tmp_path / 'empty'}: no pictures in it"),
        ((guides, guides / "results"), f"{guides / 'results'}: would mix results with {guides}"),
        ((guides, guides), f"{guides}: would mix results with {guides}"),
        ((guides, out, "--masks", guides / "b"), f"{guides / 'b'}: its masks would be edited with {guides}"),
        ((guides, out, "--masks", out), f"{out}: would mix results with {out}"),
    ):
        assert batch(*arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}\nhint: ")
        assert said.count("\n") == 2
    assert written(out) == {}


def test_two_guides_of_one_result_are_refused(batch, guides, out, capsys):
    (guides / "a.jpg").write_bytes((guides / "b" / "c.jpg").read_bytes())
    assert batch(guides, out) == 1
    assert f"{guides}: a.jpg and a.png would both become a.png" in capsys.readouterr().err


def test_a_file_that_is_no_manifest_is_left_alone(batch, guides, out, capsys):
    (out / "manifest.jsonl").write_text("one\ntwo\n")
    assert batch(guides, out) == 1
    assert f"{out / 'manifest.jsonl'}: line 1 is not of a manifest" in capsys.readouterr().err
    assert (out / "manifest.jsonl").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    "flags",
    [("--batch", 0), ("--workers", 0), ("--t0", 2), ("--sampler", "x"), ("--eta", 1), ("--fit", "x"), ("--set", "a=1")],
)
def test_options_that_make_no_sense_are_refused(flags, batch, guides, out, capsys):
    assert batch(guides, out, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 2
    assert list(out.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of POSIX")
def test_a_folder_that_its_owner_removes_meanwhile_is_not_the_one_that_is_locked(guides, out, monkeypatch):
    import fcntl

    first, second, third = (LocalPlace(guides, None, out).claimed() for _ in range(3))
    first.__enter__()
    lock = fcntl.flock

    def after_the_first_has_left(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_the_first_has_left)
    with second:
        assert [path.is_dir() for path in out.iterdir()] == [True]
        with pytest.raises(sdedit.OutputError, match="another job is writing to it"), third:
            pass
    assert list(out.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of POSIX")
def test_two_jobs_do_not_write_to_one_folder(guides, out, editor):
    claimed = LocalPlace(guides, None, out).claimed()
    with claimed, pytest.raises(sdedit.OutputError, match="another job is writing to it"):
        sdedit.edit_folder(editor, guides, out, steps=1)
