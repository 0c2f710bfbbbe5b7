"""The command line: what it writes, what it prints and where, and what it refuses."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from closed_form import SDES, identity
from PIL import Image

import sdedit
from sdedit.cli.main import main

WIDTH, HEIGHT = 12, 8


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def edit(network, write_png, picture):
    """edit(*arguments) -> exit code of `sdedit edit`: the network model, 2 steps on the CPU unless told otherwise."""
    guide = str(write_png("guide.png", picture(31, 17)))

    def run(*arguments: str | Path, guides: tuple[str, ...] = (guide,), model: Path = network) -> int:
        given = [str(word) for word in arguments]
        usual = {"--steps": "2", "--backend": "ort-cpu"}
        rest = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
        return main(["edit", *guides, "-m", str(model), *given, *rest])

    return run


@pytest.fixture
def guides(write_png, picture):
    return tuple(str(write_png(f"guide-{n}.png", picture(20, 10 + n, n))) for n in range(2))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def pipe(tmp_path):
    """pipe(path) -> the name of a pipe with the file's bytes: they can be read once."""
    opened = []

    def of(path: Path) -> str:
        name = tmp_path / f"pipe-{len(opened)}"
        os.mkfifo(name)
        opened.append(threading.Thread(target=name.write_bytes, args=(path.read_bytes(),), daemon=True))
        opened[-1].start()
        return str(name)

    return of


# --- edit: files -------------------------------------------------------------------------------------------------


def test_a_name_that_another_takes_in_the_last_moment_is_not_lost(edit, out, monkeypatch, capsys):
    def unsupported(new, path):  # and another process is faster
        path.write_text("precious")
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    assert edit("-o", out / "out.png") == 1
    assert "out.png: exists already" in capsys.readouterr().err
    assert names(out) == ["out.png"]
    assert (out / "out.png").read_text() == "precious"


def test_a_note_that_nobody_reads_does_not_end_an_edit(network, write_png, picture, out):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sdedit.cli.main", "edit", str(write_png("g.png", picture(WIDTH, HEIGHT)))]
    done = subprocess.run([*command, "-m", network, "-o", out / "out.png", "--steps", "1"], stderr=writing)
    os.close(writing)
    assert done.returncode == 0
    assert names(out) == ["out.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("more", [[], ["--fast"], ["--max-ms", "1e6"]], ids=" ".join)
def test_pictures_are_read_once_so_pipes_will_do(edit, write_png, picture, pipe, out, more):
    guide = write_png("a-guide.png", picture(WIDTH, HEIGHT))
    mask = write_png("a-mask.png", picture(WIDTH, HEIGHT, 1))
    assert edit("-o", out / "files.png", "--mask", mask, *more, guides=(str(guide),)) == 0
    assert edit("-o", out / "pipes.png", "--mask", pipe(mask), *more, guides=(pipe(guide),)) == 0
    pixels = [np.asarray(Image.open(out / name)) for name in ("files.png", "pipes.png")]
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
@pytest.mark.parametrize("late", [0, 1])
def test_a_file_that_appears_meanwhile_is_not_lost(edit, out, monkeypatch, capsys, late, links):
    def meanwhile(*given, **named):
        (out / f"out-00{late}.png").write_text("precious")
        return result(*given, **named)

    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    result = sdedit.Editor.edit
    monkeypatch.setattr(sdedit.Editor, "edit", meanwhile)
    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    assert edit("-o", out / "out.png", "-n", "2") == 1
    assert f"out-00{late}.png: exists already" in capsys.readouterr().err
    assert names(out) == [f"out-00{late}.png"]
    assert (out / f"out-00{late}.png").read_text() == "precious"
    assert edit("-o", out / "out.png", "-n", "2", "--force") == 0
    assert names(out) == ["out-000.png", "out-001.png"]


def test_one_result_goes_to_the_name_given(edit, out, capsys):
    assert edit("-o", out / "out.png") == 0
    assert names(out) == ["out.png"]
    assert capsys.readouterr().out == f"{out / 'out.png'}\n"
    with Image.open(out / "out.png") as written:
        assert (written.format, written.mode, written.size) == ("PNG", "RGB", (WIDTH, HEIGHT))


def test_several_results_are_numbered_guide_by_guide(edit, guides, out, network, capsys):
    assert edit("-o", out / "out.png", "-n", "2", "--seed", "8", guides=guides) == 0
    numbered = [f"out-{j:03d}.png" for j in range(4)]
    assert names(out) == numbered
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in numbered]
    wanted = sdedit.load(network, backend="ort-cpu").edit(list(guides), samples=2, seed=8, steps=2)
    for name, one in zip(numbered, wanted.results, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / name)), one.pixels)


@pytest.mark.parametrize("masked", [False, True])
def test_npy_is_the_raw_result_of_the_library(masked, edit, guides, out, network, write_png, capsys):
    masks = [str(write_png(f"mask-{n}.png", np.eye(10 + n, 20, dtype=np.uint8) * 200)) for n in range(2)]
    given = [word for mask in masks for word in ("--mask", mask)] if masked else []
    flags = ("--t0", "0.7", "--sampler", "dpmpp-2m-sde", "--eta", "0.5", "--fit", "pad", "--repeats", "2")
    assert edit("-o", out / "x.npy", "-n", "2", "--seed", "8", *flags, *given, guides=guides) == 0
    assert names(out) == ["x.npy"]
    assert capsys.readouterr().out == f"{out / 'x.npy'}\n"
    x = np.load(out / "x.npy", allow_pickle=False)
    wanted = sdedit.load(network, backend="ort-cpu").edit(
        list(guides),
        mask=masks if masked else None,
        **{"t0": 0.7, "steps": 2, "sampler": "dpmpp-2m-sde", "eta": 0.5, "fit": "pad", "repeats": 2},
        **{"samples": 2, "seed": 8},
    )
    assert (x.dtype, x.shape) == (np.float32, (4, 3, HEIGHT, WIDTH))
    assert np.array_equal(x, wanted.x)


def test_with_a_mask_the_picture_has_the_guides_size(edit, out, write_png):
    mask = str(write_png("mask.png", np.eye(17, 31, dtype=np.uint8) * 255))
    assert edit("-o", out / "out.png", "--mask", mask) == 0
    assert Image.open(out / "out.png").size == (31, 17)


@pytest.mark.parametrize("name", ["out.png", "out.npy", "several.png"])
def test_an_existing_file_is_replaced_only_when_forced(name, edit, out, capsys):
    existing = out / ("several-001.png" if name == "several.png" else name)
    existing.write_bytes(b"precious")
    command = ["-o", out / name, *(["-n", "2"] if name == "several.png" else [])]
    assert edit(*command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {existing}: exists already\nhint: choose another name, or --force to replace it\n"
    assert names(out) == [existing.name]
    assert existing.read_bytes() == b"precious"
    assert edit(*command, "--force") == 0
    assert existing.read_bytes() != b"precious"
    assert names(out) == (["several-000.png", "several-001.png"] if name == "several.png" else [name])


def test_when_a_file_cannot_be_written_none_is_left(edit, out, monkeypatch, capsys):
    write, written = Image.Image.save, []

    def full_at_the_second(image, file, *rest, **options):
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(image, file, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", full_at_the_second)
    assert edit("-o", out / "out.png", "-n", "3") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert names(out) == []


def test_an_interrupted_edit_leaves_nothing_and_exits_130(edit, out, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert edit("-o", out / "out.png") == 130
    assert "error: interrupted" in capsys.readouterr().err
    assert names(out) == []


# --- edit: what is printed ---------------------------------------------------------------------------------------


def test_json_is_one_object_with_everything_resolved(edit, out, capsys):
    assert edit("-o", out / "out.png", "-n", "2", "--seed", "8", "--sampler", "ddim", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    wanted = {"t0": 0.5, "steps": 2, "sampler": "ddim", "eta": 0.0, "seed": 8, "samples": 2, "repeats": 1}
    assert said["options"].items() >= {**wanted, "fit": "crop"}.items()
    assert (said["backend"]["name"], said["backend"]["precision"]) == ("ort-cpu", "fp32")
    assert said["seeds"] == [8, 9]
    assert said["outputs"] == [str(out / "out-000.png"), str(out / "out-001.png")]
    assert said["timings"]["evaluations"] == 4
    assert all(said["timings"][name] > 0 for name in ("load_ms", "total_ms", "loop_ms", "network_ms"))


def test_notes_go_to_stderr(edit, out, write_png, capsys):
    small = str(write_png("small.png", np.full((4, 5, 4), 128, np.uint8)))
    assert edit("-o", out / "out.png", "--json", "--backend", "auto", guides=(small,)) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["outputs"] == [str(out / "out.png")]
    assert re.search(r"^backend: ort-\w+, fp32, \d+ threads$", said.err, re.MULTILINE)
    assert f"{small}: transparent parts put on white" in said.err
    assert f"{small}: 5x4 is smaller than the model's 12x8: enlarged" in said.err


def test_an_edit_with_nothing_to_say_is_quiet(edit, out, capsys):
    assert edit("-o", out / "out.png") == 0
    assert capsys.readouterr().err == ""


def on_a_terminal(run, monkeypatch) -> str:
    """What run() writes to stderr when that is a pseudo-terminal."""
    main_end, terminal_end = pty.openpty()
    os.set_blocking(main_end, False)  # reading nothing is an error, not a wait
    with open(terminal_end, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run() == 0
        terminal.flush()
        written = os.read(main_end, 65536)
    os.close(main_end)
    return written.decode()


def test_a_progress_bar_is_drawn_on_a_terminal_and_wiped(edit, out, monkeypatch, capsys):
    seen = on_a_terminal(lambda: edit("-o", out / "out.png", "--steps", "7"), monkeypatch)
    assert re.search(r"\r█+ 7/7", seen)
    assert seen.endswith("\r\x1b[K")
    assert capsys.readouterr().out == f"{out / 'out.png'}\n"


def test_no_progress_bar_where_there_is_no_terminal(edit, out, capsys):
    assert edit("-o", out / "out.png", "--steps", "7") == 0
    said = capsys.readouterr()
    assert not set("\r\x1b█") & set(said.err + said.out)


# --- edit: the artifact's own settings ---------------------------------------------------------------------------


def test_the_artifacts_defaults_are_used_and_flags_win(edit, out, tmp_path, write_png, picture, capsys):
    defaults = {"t0": 0.3, "steps": 4, "sampler": "em"}
    model = identity(tmp_path / "own.onnx", SDES["vp"], (3, HEIGHT, WIDTH), defaults=defaults)
    guide = str(write_png("guide.png", picture(WIDTH, HEIGHT)))
    for flags, wanted in (
        ([], defaults),
        (["--t0", "0.6"], defaults | {"t0": 0.6}),
        (["--steps", "3"], defaults | {"steps": 3}),
        (["--sampler", "ddim"], defaults | {"sampler": "ddim"}),
    ):
        command = ["edit", guide, "-m", str(model), "-o", str(out / "x.npy"), "--json", "--force", *flags]
        assert main([*command, "--backend", "ort-cpu"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["options"].items() >= wanted.items()
        assert said["timings"]["evaluations"] == wanted["steps"]
        asked = sdedit.load(model, backend="ort-cpu").edit(guide, **wanted)
        assert np.array_equal(np.load(out / "x.npy"), asked.x)


def test_unknown_metadata_keys_are_kept_and_ignored(edit, out, tmp_path, capsys):
    extra = {"colour": "blue", "thumbnail": {"width": [1, 2]}}
    model = identity(tmp_path / "own.onnx", SDES["vp"], (3, HEIGHT, WIDTH), **extra)
    assert edit("-o", out / "out.png", model=model) == 0
    capsys.readouterr()
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"].items() >= extra.items()


@pytest.mark.parametrize("label", [0, 3, 9])
def test_set_gives_the_model_its_further_input(label, edit, labelled, out, capsys):
    assert edit("-o", out / "x.npy", "--set", f"class_label={label}", "--json", model=labelled) == 0
    assert json.loads(capsys.readouterr().out)["options"]["conditions"] == {"class_label": label}
    np.testing.assert_allclose(np.load(out / "x.npy"), label / 10, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the model needs a value for its input class_label"),
        (["class_label=10"], "class_label is 10; wanted a whole number from 0 to 9"),
        (["class_label=-1"], "class_label is -1; wanted a whole number from 0 to 9"),
        (["class_label=2.5"], "class_label is 2.5; wanted a whole number from 0 to 9"),
        (["class_label=nan"], "class_label is nan; wanted a whole number from 0 to 9"),
        (["class_label=3", "depth=1"], "the model has no input depth to set"),
    ],
    ids=lambda value: " ".join(value) or "missing" if isinstance(value, list) else "",
)
def test_set_refuses_what_the_model_does_not_take(given, message, edit, labelled, out, capsys):
    flags = [word for value in given for word in ("--set", value)]
    assert edit("-o", out / "x.npy", *flags, model=labelled) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}\nhint: ")
    assert names(out) == []


def test_set_is_refused_by_a_model_without_further_inputs(edit, out, capsys):
    assert edit("-o", out / "x.npy", "--set", "class_label=3") == 2
    assert capsys.readouterr().err.startswith("error: the model has no input class_label to set\nhint: ")


@pytest.mark.parametrize("text", ["class_label", "=3", "class_label=cat"])
def test_set_wants_a_name_and_a_number(text, edit, labelled, out, capsys):
    with pytest.raises(SystemExit) as left:
        edit("-o", out / "x.npy", "--set", text, model=labelled)
    assert left.value.code == 2
    assert "error: argument --set" in capsys.readouterr().err


# --- inspect and doctor ------------------------------------------------------------------------------------------


def test_inspect_json_shows_the_artifact(labelled, capsys):
    assert main(["inspect", str(labelled), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(labelled)
    assert said["metadata"]["image"] == {"channels": 3, "height": HEIGHT, "width": WIDTH}
    assert said["metadata"]["sde"] == SDES["vp"]
    assert [(t["name"], t["dtype"], len(t["shape"])) for t in said["inputs"]] == [
        ("x", "float32", 4),
        ("sigma", "float32", 1),
        ("class_label", "int64", 1),
    ]
    assert [(t["name"], t["dtype"], t["shape"][1:]) for t in said["outputs"]] == [
        ("denoised", "float32", [3, HEIGHT, WIDTH])
    ]
    assert "table" not in said


@pytest.mark.parametrize("kind", SDES)
def test_inspect_json_shows_the_step_table(kind, tmp_path, capsys):
    model = identity(tmp_path / f"{kind}.onnx", SDES[kind], (3, HEIGHT, WIDTH))
    command = ["inspect", str(model), "--t0", "0.4", "--steps", "7", "--sampler", "ddim", "--eta", "0.5", "--json"]
    assert main(command) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert table["columns"] == ["sigma", "a", "b", "c", "d", "sigma_next"]
    wanted = sdedit.plan(sdedit.load(model).sde, t0=0.4, steps=7, sampler="ddim", eta=0.5)
    assert table["rows"] == wanted.rows.tolist()
    assert table["version"] == wanted.version


def test_inspect_prints_the_artifact_and_its_table(network, capsys):
    assert main(["inspect", str(network), "--steps", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{network}  ")
    for word in ("closed-form", "3 x 8 x 12", "vp  beta_min 0.1  beta_max 20.0", "denoised float32", "sigma_next"):
        assert word in said.out
    assert re.findall(r"^ +(\d)  .*", said.out, re.MULTILINE) == ["1", "2", "3"]


def test_doctor_json_says_what_works_and_how_to_fix_the_rest(capsys):
    code = main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["version"] == sdedit.__version__
    assert said["packages"]["numpy"] == np.__version__
    assert {backend["name"] for backend in said["backends"]} >= {"ort-cpu", "ort-cuda", "ort-tensorrt"}
    for backend in said["backends"]:
        assert backend["works"] or (backend["cause"] and backend["fix"])
    assert code == (0 if any(backend["works"] for backend in said["backends"]) else 1)


def test_doctor_prints_a_line_for_every_backend(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    assert f"sdedit-engine {sdedit.__version__}" in said
    for name in ("ort-cpu", "ort-cuda", "ort-tensorrt"):
        assert re.search(rf"^  {name} +\S", said, re.MULTILINE)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"sdedit-engine {sdedit.__version__}\n"
