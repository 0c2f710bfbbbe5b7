"""Simulated stroke paintings: the paper's median filter and palette, at any size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import sdedit
from sdedit.cli.main import main
from sdedit.painting import median, scaled_kernel


def texture(width: int, height: int) -> np.ndarray:
    """A picture with smooth parts and edges, (height, width, 3) uint8."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def test_at_256_it_is_pillows_median_of_23_and_adaptive_palette_of_6():
    photo = Image.fromarray(texture(256, 256))
    filtered = photo.filter(ImageFilter.MedianFilter(23))
    wanted = filtered.convert("P", palette=Image.Palette.ADAPTIVE, colors=6).convert("RGB")
    assert np.array_equal(np.asarray(sdedit.strokes(photo)), np.asarray(wanted))


def test_a_speck_smaller_than_half_of_the_window_is_gone():
    photo = np.full((256, 256, 3), (10, 200, 30), np.uint8)
    photo[100:110, 100:110] = 255
    assert np.unique(np.asarray(sdedit.strokes(photo)).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_the_median_of_three_by_three_by_hand():
    plane = np.array([[1, 2, 3], [4, 9, 6], [7, 8, 5]], np.uint8)
    assert median(plane, 3)[1, 1] == 5
    assert median(plane, 3)[0, 0] == 2  # of 1 1 2, 1 1 2, 4 4 9: edges are repeated


@pytest.mark.parametrize("kernel", [1, 3, 11, 23, 61])
@pytest.mark.parametrize("size", [(40, 23), (1, 9), (64, 64)])
def test_the_median_is_pillows_for_every_width(kernel, size):
    plane = texture(*size)[..., 0]
    assert np.array_equal(
        median(plane, kernel), np.asarray(Image.fromarray(plane).filter(ImageFilter.MedianFilter(kernel)))
    )


@pytest.mark.parametrize(
    ("kernel", "side", "width"),
    [(23, 256, 23), (23, 64, 5), (23, 512, 47), (23, 1024, 93), (23, 8, 1), (1, 4096, 1), (22, 256, 23)],
)
def test_the_filter_is_scaled_with_the_shorter_side_to_the_nearest_odd_number(kernel, side, width):
    assert scaled_kernel(kernel, side) == width


def test_the_shorter_side_counts_whichever_it_is():
    wide = sdedit.strokes(texture(256, 64), colors=256)
    tall = sdedit.strokes(texture(256, 64).transpose(1, 0, 2).copy(), colors=256)
    assert np.array_equal(np.asarray(wide), np.asarray(tall).transpose(1, 0, 2))


@pytest.mark.parametrize("colors", [2, 6, 16])
def test_it_has_at_most_so_many_colours_and_the_photographs_size(colors):
    painting = np.asarray(sdedit.strokes(texture(100, 80), colors=colors))
    assert painting.shape == (80, 100, 3)
    assert len(np.unique(painting.reshape(-1, 3), axis=0)) <= colors


@pytest.mark.parametrize("options", [{"colors": 1}, {"colors": 257}, {"colors": 6.0}, {"kernel": 0}, {"kernel": 256}])
def test_other_numbers_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(sdedit.OptionError, match=f"^{name} is "):
        sdedit.strokes(texture(16, 16), **options)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "one.jpg", tmp_path / "two.png"]
    for number, path in enumerate(paths):
        Image.fromarray(np.rot90(texture(32, 24), number)).save(path)
    return paths


def painted(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_photograph_goes_to_the_name_given(photos, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["strokes", str(photos[1]), "-o", str(out), "--colors", "4", "--kernel", "60"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert np.array_equal(painted(out), np.asarray(sdedit.strokes(photos[1], colors=4, kernel=60)))


def test_several_are_numbered(photos, tmp_path, capsys):
    assert main(["strokes", *map(str, photos), "-o", str(tmp_path / "out.png")]) == 0
    paths = [tmp_path / "out-000.png", tmp_path / "out-001.png"]
    assert capsys.readouterr().out.splitlines() == list(map(str, paths))
    for photo, path in zip(photos, paths, strict=True):
        assert np.array_equal(painted(path), np.asarray(sdedit.strokes(photo)))


def test_in_a_folder_they_keep_their_names(photos, tmp_path):
    (tmp_path / "paintings").mkdir()
    assert main(["strokes", *map(str, photos), "-o", str(tmp_path / "paintings")]) == 0
    assert sorted(path.name for path in (tmp_path / "paintings").iterdir()) == ["one.png", "two.png"]


def test_it_has_the_same_bytes_every_time(photos, tmp_path):
    for name in ("a.png", "b.png"):
        assert main(["strokes", str(photos[0]), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        (["two.png", "-o", "two.png"], 1, "two.png: would overwrite an input", "choose another name"),
        (["none.png", "-o", "out.png"], 1, "none.png: no such file", "check the path"),
        (["two.png", "-o", "out.jpg"], 2, "out.jpg: outputs are .png", "-o out.png"),
        (["two.png", "-o", "out.png", "--colors", "1"], 2, "colors is 1; wanted a whole number", "the paper uses 6"),
        (["one.jpg", "two.png", "one.jpg", "-o", "."], 2, "two photographs would become one.png", "rename one"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_and_nothing_written(words, code, error, hint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["strokes", *words]) == code
    told = capsys.readouterr().err
    assert f"error: {error}" in told
    assert f"hint: {hint}" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
