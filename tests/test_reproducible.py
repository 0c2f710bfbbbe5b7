"""The same bytes again: seeds, batches, threads, sources, the record in a PNG and its replay, progress and results."""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit.cli.main import main

WIDTH, HEIGHT = 12, 8
FOLDER = "a-private-folder"


# --- Seeds and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
def test_the_same_seed_gives_the_same_bytes(sampler, network, editor, picture):
    options = {"sampler": sampler, "steps": 4, "seed": 3, "repeats": 2, "samples": 2}
    first = editor.edit(picture(WIDTH, HEIGHT), **options)
    again = editor.edit(picture(WIDTH, HEIGHT), **options)
    elsewhere = sdedit.load(network, backend="ort-cpu", threads=1).edit(picture(WIDTH, HEIGHT), **options)
    assert first.x.tobytes() == again.x.tobytes() == elsewhere.x.tobytes()
    assert [i.tobytes() for i in first.images] == [i.tobytes() for i in again.images]


def test_another_seed_gives_another_picture(editor, picture):
    x = editor.edit(picture(WIDTH, HEIGHT), steps=3, samples=3).x
    assert all(np.abs(x[i] - x[j]).max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_is_the_same_alone_and_in_a_batch(masked, batch, editor, picture):
    guides = [picture(*size) for size in ((12, 8), (31, 17), (5, 9), (12, 8))]
    masks = [np.tile(np.linspace(0, 255, g.shape[1]).astype(np.uint8), (len(g), 1)) for g in guides]
    options = {"steps": 4, "repeats": 2, "sampler": "dpmpp-2m-sde", "fit": "stretch"}
    together = editor.edit(guides, mask=masks if masked else None, samples=2, seed=40, batch=batch, **options)
    assert len(together.results) == 8
    for j, one in enumerate(together.results):
        mask = masks[j // 2] if masked else None
        alone = editor.edit(guides[j // 2], mask=mask, seed=40 + j, **options)
        np.testing.assert_allclose(one.x, alone.x[0], rtol=0, atol=1e-5)
        assert one.pixels.shape == alone.results[0].pixels.shape


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 2, 2**64 - 2])
def test_result_j_has_seed_plus_j_modulo_two_to_the_64(seed, editor, picture):
    guides = [picture(WIDTH, HEIGHT, n) for n in range(2)]
    result = editor.edit(guides, samples=2, seed=seed, steps=2)
    assert result.seeds == [(seed + j) % 2**64 for j in range(4)]
    for j, x in enumerate(result.x):
        alone = editor.edit(guides[j // 2], seed=result.seeds[j], steps=2)
        assert np.array_equal(x, alone.x[0])


def test_threads_that_share_an_editor_get_what_they_would_get_in_turn(editor, picture):
    guide = picture(WIDTH, HEIGHT)

    def edit(seed: int) -> bytes:
        return editor.edit(guide, seed=seed, steps=20, samples=2, batch=1 + seed % 2).x.tobytes()

    in_turn = [edit(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(edit, range(24)))
    assert at_once == in_turn
    assert len(set(in_turn)) == 24


# --- Sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_paths_pil_images_and_arrays_give_the_same_result(masked, editor, picture, write_png):
    pixels, mask = picture(20, 14), picture(20, 14)[..., 0] * 2
    files = write_png("guide.png", pixels), write_png("mask.png", mask)
    sources = [
        (pixels, mask),
        (np.asfortranarray(pixels), mask[..., None]),
        (Image.fromarray(pixels), Image.fromarray(mask)),
        (files[0], files[1]),
        (str(files[0]), str(files[1])),
        ([pixels], [mask]),
        ((pixels,), (mask,)),
    ]
    results = [editor.edit(g, mask=m if masked else None, steps=2, fit="pad").results[0] for g, m in sources]
    assert len({one.x.tobytes() for one in results}) == 1
    assert len({one.pixels.tobytes() for one in results}) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_photograph_turned_by_exif_equals_the_turned_pixels(masked, editor, picture, tmp_path):
    stored = picture(30, 17)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown a quarter turn clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(stored, -1)
    mask = np.zeros(upright.shape[:2], np.uint8)
    mask[3:9, 2:7] = 255
    sources = tmp_path / "turned.png", Image.open(tmp_path / "turned.png"), upright
    results = [editor.edit(source, mask=mask if masked else None, steps=2).results[0] for source in sources]
    assert len({one.pixels.tobytes() for one in results}) == 1
    assert results[0].pixels.shape == (upright.shape if masked else (HEIGHT, WIDTH, 3))


def test_guides_of_different_sizes_share_an_edit(editor, picture):
    guides = [picture(12, 8), picture(50, 9), picture(3, 3)]
    result = editor.edit(guides, steps=2)
    assert [one.guide.size for one in result.results] == [(12, 8), (50, 9), (3, 3)]
    assert [image.size for image in result.images] == [(WIDTH, HEIGHT)] * 3


# --- The result --------------------------------------------------------------------------------------------------


def test_a_result_carries_the_options_as_resolved(editor, picture):
    result = editor.edit(picture(WIDTH, HEIGHT), steps=3, sampler="ddim", seed=9)
    assert result.options == sdedit.EditOptions(t0=0.5, steps=3, sampler="ddim", eta=0.0, spacing="uniform", seed=9)
    assert editor.edit(picture(WIDTH, HEIGHT)).options == sdedit.EditOptions(
        t0=0.5, steps=50, sampler="ancestral", spacing="uniform"
    )


@pytest.mark.parametrize(("samples", "batch", "calls"), [(1, 1, 6), (5, 1, 30), (5, 3, 12)])
def test_the_timings_count_network_calls(samples, batch, calls, editor, picture):
    timings = editor.edit(picture(WIDTH, HEIGHT), steps=3, repeats=2, samples=samples, batch=batch).timings
    assert timings.evaluations == calls
    assert timings.total_ms >= timings.loop_ms >= timings.network_ms > 0  # each is a part of the one before


def test_the_raw_result_is_float32_and_the_picture_is_its_rounding(editor, picture):
    result = editor.edit(picture(WIDTH, HEIGHT), steps=2)
    assert (result.x.dtype, result.x.shape) == (np.float32, (1, 3, HEIGHT, WIDTH))
    exact = np.clip((np.moveaxis(result.x[0], 0, 2).astype(np.float64) + 1) * 127.5, 0, 255)
    assert np.abs(np.asarray(result.images[0]) - exact).max() < 0.51


# --- Progress ----------------------------------------------------------------------------------------------------


def test_on_step_sees_every_step(editor, picture):
    seen = []
    editor.edit(picture(WIDTH, HEIGHT), steps=3, repeats=2, samples=3, batch=2, on_step=lambda p: seen.append(p))
    assert [(p.done, p.total) for p in seen] == [(n, 12) for n in range(1, 13)]
    assert [(p.step.repeat, p.step.number) for p in seen] == [(k, n) for k in (0, 1) for n in (1, 2, 3)] * 2
    assert {p.step.steps for p in seen} == {3}
    sigmas = sdedit.plan(editor.sde, steps=3).column("sigma")
    assert [float(p.step.sigma) for p in seen] == sigmas.tolist() * 4


@pytest.mark.parametrize("masked", [False, True])
def test_the_preview_looks_like_the_result(masked, editor, picture):
    guide = picture(20, 14)
    mask = np.full((14, 20), 255, np.uint8)
    mask[:, ::2] = 0
    previews: list[list[Image.Image]] = []
    result = editor.edit(
        guide,
        mask=mask if masked else None,
        on_step=lambda progress: previews.append(progress.preview()),
        **{"steps": 3, "samples": 3, "batch": 2, "fit": "stretch"},
    )
    assert {image.size for images in previews for image in images} == {(20, 14) if masked else (WIDTH, HEIGHT)}
    assert [len(images) for images in previews] == [2, 2, 2, 1, 1, 1]
    last = [*previews[2], *previews[5]]
    assert [image.tobytes() for image in last] == [image.tobytes() for image in result.images]


def test_returning_false_cancels(editor, picture):
    seen = []

    def stop_at_two(progress: sdedit.Progress) -> bool:
        seen.append(progress.done)
        return progress.done < 2

    with pytest.raises(sdedit.Cancelled, match="step 2 of 5"):
        editor.edit(picture(WIDTH, HEIGHT), steps=5, samples=2, on_step=stop_at_two)
    assert seen == [1, 2]


@pytest.mark.parametrize("answer", [None, True, 0])
def test_only_false_itself_cancels(answer, editor, picture):
    guide = picture(WIDTH, HEIGHT)
    watched = editor.edit(guide, steps=2, on_step=lambda progress: answer)
    assert np.array_equal(watched.x, editor.edit(guide, steps=2).x)


def test_an_exception_from_on_step_reaches_the_caller(editor, picture):
    def fail(progress: sdedit.Progress) -> None:
        raise LookupError("from the callback")

    with pytest.raises(LookupError, match="from the callback"):
        editor.edit(picture(WIDTH, HEIGHT), steps=2, on_step=fail)


# --- The record and its replay -----------------------------------------------------------------------------------


def record_of(png: Path) -> dict:
    """The JSON of the one text chunk `sdedit`, read without any library."""
    data, at, found = png.read_bytes(), 8, []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"tEXt":
            keyword, text = data[at + 8 : at + 8 + length].split(b"\0", 1)
            if keyword == b"sdedit":
                found.append(json.loads(text))
        at += 12 + length
    assert len(found) == 1
    return found[0]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def job(network, labelled, picture, tmp_path):
    """job(*flags, mask=False, model=network) edits a guide in a folder of its own -> (inputs, the output folder)."""
    home, out = tmp_path / FOLDER, tmp_path / "out"
    home.mkdir()
    out.mkdir()
    guide, mask = home / "guide.png", home / "mask.png"
    Image.fromarray(picture(31, 17)).save(guide)
    soft = np.tile(np.linspace(0, 255, 17).astype(np.uint8)[:, None], (1, 31))
    soft[:, 10:] = 0
    Image.fromarray(soft).save(mask)
    copies = {"network": home / "model.onnx", "labelled": home / "labelled.onnx"}
    copies["network"].write_bytes(network.read_bytes())
    copies["labelled"].write_bytes(labelled.read_bytes())

    def run(*flags: str, masked: bool = False, model: str = "network") -> tuple[list[str], Path]:
        inputs = [str(guide), *(["--mask", str(mask)] if masked else []), "-m", str(copies[model])]
        common = ["--steps", "3"] * ("--steps" not in flags) + ["--backend", "ort-cpu", "--threads", "1"]
        assert main(["edit", *inputs, *common, *flags, "-o", str(out / "out.png")]) == 0
        return inputs, out

    return run


JOBS = {
    "plain": ((), {}),
    "with a mask": (("--seed", "5"), {"masked": True}),
    "ddim with eta 0.5": (("--sampler", "ddim", "--eta", "0.5"), {}),
    "repeats": (("--repeats", "3", "--t0", "0.4"), {"masked": True}),
    "pad": (("--fit", "pad"), {"masked": True}),
    "the largest seed": (("--seed", str(2**64 - 1)), {}),
    "a condition": (("--set", "class_label=3"), {"model": "labelled"}),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_replay_makes_the_same_bytes(name, job):
    flags, how = JOBS[name]
    inputs, out = job(*flags, **how)
    assert main(["edit", "--replay", str(out / "out.png"), *inputs, "-o", str(out / "again.png")]) == 0
    assert (out / "again.png").read_bytes() == (out / "out.png").read_bytes()


def test_one_of_several_samples_is_replayed_alone(job):
    inputs, out = job("-n", "3", "--seed", str(2**64 - 1), "--sampler", "em", masked=True)
    for j in range(3):
        one = out / f"out-{j:03d}.png"
        assert record_of(one)["options"]["seed"] == (2**64 - 1 + j) % 2**64
        assert main(["edit", "--replay", str(one), *inputs, "-o", str(out / "again.png"), "--force"]) == 0
        assert (out / "again.png").read_bytes() == one.read_bytes()


@pytest.mark.parametrize("change", ["guide", "mask", "model", "mask left out", "mask added"])
def test_a_replay_refuses_other_files(change, job, network, write_png, picture, capsys):
    inputs, out = job(masked=change != "mask added")
    guide, mask, model = Path(inputs[0]), Path(inputs[0]).with_name("mask.png"), Path(inputs[-1])
    match change:
        case "guide":
            pixels = np.asarray(Image.open(guide)).copy()
            pixels[0, 0, 0] ^= 1
            Image.fromarray(pixels).save(guide)
        case "mask":
            Image.open(mask).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mask)
        case "model":
            model.write_bytes(model.with_name("labelled.onnx").read_bytes())
        case "mask left out":
            inputs = [str(guide), "-m", str(model)]
        case "mask added":
            inputs = [str(guide), "--mask", str(mask), "-m", str(model)]
    capsys.readouterr()
    assert main(["edit", "--replay", str(out / "out.png"), *inputs, "-o", str(out / "again.png")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: the {change.split()[0]} is not the one recorded")
    assert "\nhint: " in said.err
    assert [path.name for path in out.iterdir()] == ["out.png"]


CHANGED = [
    *(("--t0", "0.5"), ("--steps", "3"), ("--sampler", "em"), ("--eta", "0.5"), ("--seed", "0"), ("-n", "1")),
    *(("--repeats", "1"), ("--fit", "crop"), ("--backend", "ort-cpu"), ("--precision", "fp32"), ("--threads", "1")),
    ("--set", "class_label=3"),
]


@pytest.mark.parametrize("flag", CHANGED, ids=lambda flag: flag[0])
def test_a_replay_refuses_flags_that_the_record_decides(flag, job, capsys):
    inputs, out = job()
    capsys.readouterr()
    assert main(["edit", "--replay", str(out / "out.png"), *inputs, *flag, "-o", str(out / "again.png")]) == 2
    assert capsys.readouterr().err.startswith("error: --replay takes its options from the record")
    assert [path.name for path in out.iterdir()] == ["out.png"]


def test_a_replay_makes_one_png_of_one_guide(job):
    inputs, out = job()
    assert main(["edit", "--replay", str(out / "out.png"), *inputs, "-o", str(out / "again.npy")]) == 2
    assert main(["edit", "--replay", str(out / "out.png"), inputs[0], *inputs, "-o", str(out / "again.png")]) == 2
    assert [path.name for path in out.iterdir()] == ["out.png"]


def test_a_picture_without_a_record_cannot_be_replayed(job, capsys):
    inputs, out = job()
    capsys.readouterr()
    assert main(["edit", "--replay", inputs[0], *inputs, "-o", str(out / "again.png")]) == 1
    assert "carries no record" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["out.png"]


def test_the_record_says_what_made_the_picture(job):
    import onnxruntime
    import PIL

    inputs, out = job("--sampler", "ddim", "--seed", "17", "--repeats", "2", masked=True)
    record = record_of(out / "out.png")
    wanted = {"t0": 0.5, "steps": 3, "sampler": "ddim", "eta": 0.0, "seed": 17, "repeats": 2, "fit": "crop"}
    assert record["options"].items() >= wanted.items()
    assert record["noise"] == "philox-bm24-v1"
    assert record["artifact"]["sha256"] == sha256(Path(inputs[-1]))
    assert record["guide"]["sha256"] == sha256(Path(inputs[0]))
    assert record["mask"]["sha256"] == sha256(Path(inputs[2]))
    assert record["backend"] == {"name": "ort-cpu", "precision": "fp32", "threads": 1}
    versions = {
        "sdedit-engine": sdedit.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    assert record["versions"].items() >= versions.items()


def test_the_record_without_a_mask_says_so(job):
    assert record_of(job()[1] / "out.png")["mask"] is None


def test_the_written_picture_names_no_folder(job, tmp_path, capsys):
    inputs, out = job(masked=True)
    assert capsys.readouterr().out == f"{out / 'out.png'}\n"
    data = (out / "out.png").read_bytes()
    paths = [word for word in inputs if not word.startswith("-")]
    assert len(paths) == 3
    for word in (FOLDER, tmp_path.name, *paths):
        assert word.encode() not in data


def test_inspect_shows_the_record(job, capsys):
    out = job("--seed", "17")[1] / "out.png"
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "record": record_of(out)}
