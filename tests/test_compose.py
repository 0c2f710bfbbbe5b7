"""Collages and their masks, by hand; the classical blends by what defines them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit import Patch, output
from sdedit.cli.compose import parse_patch
from sdedit.cli.main import main


@pytest.fixture
def target(picture):
    return picture(20, 16, seed=1)


@pytest.fixture
def source(picture):
    return 120 + picture(12, 10, seed=2)


def test_a_patch_is_copied_from_where_it_lies_to_where_it_goes(target, source):
    made = sdedit.compose(target, [Patch(source, 2, 3, 5, 4, to=(11, 7))])
    wanted = target.copy()
    wanted[7:11, 11:16] = source[3:7, 2:7]
    assert np.array_equal(np.asarray(made.guide), wanted)
    mask = np.zeros((16, 20), np.uint8)
    mask[7:11, 11:16] = 255
    assert np.array_equal(np.asarray(made.mask), mask)


def test_without_a_place_it_goes_to_the_same_one(target, source):
    made = np.asarray(sdedit.compose(target, [Patch(source, 2, 3, 5, 4)]).guide)
    assert np.array_equal(made[3:7, 2:7], source[3:7, 2:7])
    assert (made != target).any(axis=2).sum() <= 20


def test_later_patches_lie_on_earlier_ones_and_the_mask_has_both(target, source):
    made = sdedit.compose(target, [Patch(source, 0, 0, 6, 6), Patch(target, 10, 8, 6, 6, to=(3, 3))])
    guide, mask = np.asarray(made.guide), np.asarray(made.mask)
    assert np.array_equal(guide[3:9, 3:9], target[8:14, 10:16])
    assert np.array_equal(guide[:3, :6], source[:3, :6])
    assert (mask == 255).sum() == 36 + 36 - 9


def test_the_mask_grows_then_fades_in_even_steps_and_stops_at_the_border(target):
    made = sdedit.compose(target, [Patch(target, 1, 6, 4, 2, to=(1, 6))], grow=2, feather=3)
    row = np.asarray(made.mask)[6]
    assert row[:7].tolist() == [255] * 7  # the patch ends at 5, and grows by 2
    assert row[7:11].tolist() == [191, 128, 64, 0]  # 3/4, 2/4, 1/4
    column = np.asarray(made.mask)[:, 2]
    assert column[:5].tolist() == [0, 64, 128, 191, 255]


@pytest.mark.parametrize("blend", ["poisson", "laplacian"])
@pytest.mark.parametrize("box", [(4, 4, 9, 8), (4, 0, 9, 8), (11, 8, 9, 8), (0, 0, 19, 15), (0, 0, 20, 16)])
def test_a_patch_of_the_target_itself_in_its_place_changes_nothing(blend, box, target):
    pytest.importorskip("cv2")
    made = np.asarray(sdedit.compose(target, [Patch(target, *box)], blend=blend).guide)
    assert np.abs(made.astype(int) - target).max() <= 1


def test_poisson_keeps_the_targets_colour_and_takes_the_sources_gradients():
    pytest.importorskip("cv2")
    target = np.full((40, 50, 3), 100, np.uint8)
    source = np.full((40, 50, 3), 180, np.uint8)
    source[15:18, 20:24] = 230
    made = np.asarray(sdedit.compose(target, [Patch(source, 12, 10, 21, 14)], blend="poisson").guide).astype(int)
    inside = np.zeros((40, 50), bool)
    inside[10:24, 12:33] = True
    assert (made[~inside] == 100).all()
    assert np.abs(made[12, 14:30] - 100).max() < 12  # flat parts take the target's 100, not 180
    assert (made[16, 22] - made[16, 17]).min() > 35  # the step of 50 is still there


def test_a_laplacian_blend_is_the_patch_inside_the_target_far_away_and_smooth_between():
    pytest.importorskip("cv2")
    target, source = np.full((64, 96, 3), 40, np.uint8), np.full((64, 96, 3), 200, np.uint8)
    made = np.asarray(sdedit.compose(target, [Patch(source, 0, 0, 48, 64)], blend="laplacian").guide).astype(int)
    row = made[32, :, 0]
    assert row[0] > 195
    assert row[-1] < 45
    assert (np.diff(row) <= 1).all()
    assert -np.diff(row).min() < 40  # the step of 160 is spread out


def test_an_unknown_blend_and_no_patch_are_refused(target):
    with pytest.raises(sdedit.OptionError, match="unknown blend 'alpha'"):
        sdedit.compose(target, [Patch(target, 0, 0, 4, 4)], blend="alpha")
    with pytest.raises(sdedit.OptionError, match="no patch to copy"):
        sdedit.compose(target, [])


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [5, (1,), (1.5, 2), "ab"])
def test_a_patch_goes_to_whole_pixels(target, to):
    with pytest.raises(sdedit.OptionError, match="wanted whole pixels"):
        sdedit.compose(target, [Patch(target, 0, 0, 4, 4, to=to)])


@pytest.mark.parametrize(
    ("text", "patch"),
    [
        ("a.png@1,2,3,4", Patch("a.png", 1, 2, 3, 4)),
        ("a.png@1,2,3,4:5,6", Patch("a.png", 1, 2, 3, 4, to=(5, 6))),
        ("a@b:c.png@0,0,3,4", Patch("a@b:c.png", 0, 0, 3, 4)),
    ],
)
def test_a_patch_is_read(text, patch):
    assert parse_patch(text) == patch


@pytest.fixture
def shelf(write_png, target, source, tmp_path, monkeypatch):
    write_png("target.png", target)
    write_png("source.png", source)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mask_out", ["m.png", "elsewhere/m.png"])
def test_guide_and_mask_are_written_and_named(mask_out, shelf, target, source, capsys):
    words = ["--patch", "source.png@2,3,5,4:11,7", "--patch", "target.png@0,0,3,3:9,9", "--grow", "1"]
    assert main(["compose", "target.png", *words, "-o", "g.png", "--mask-out", mask_out]) == 0
    assert capsys.readouterr().out == f"g.png\n{mask_out}\n"
    patches = [Patch(source, 2, 3, 5, 4, to=(11, 7)), Patch(target, 0, 0, 3, 3, to=(9, 9))]
    wanted = sdedit.compose(target, patches, grow=1)
    assert np.array_equal(np.asarray(Image.open("g.png")), np.asarray(wanted.guide))
    with Image.open(mask_out) as mask:
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), np.asarray(wanted.mask))


def test_where_the_mask_cannot_be_written_the_guide_stays_as_it_was(shelf, monkeypatch, capsys):
    Path("g.png").write_bytes(b"before")
    monkeypatch.setattr(output.os, "replace", no_second(os.replace))
    words = ["compose", "target.png", "--patch", "source.png@0,0,5,5", "-o", "g.png", "--force"]
    assert main([*words, "--mask-out", "elsewhere/m.png"]) == 1
    assert "elsewhere/m.png: cannot be written: full" in capsys.readouterr().err
    assert Path("g.png").read_bytes() == b"before"
    assert list(Path("elsewhere").iterdir()) == []


def no_second(replace):
    """os.replace, to one folder only."""

    def to_here(old, new):
        if Path(new).parent.name == "elsewhere":
            raise OSError(28, "full")
        replace(old, new)

    return to_here


def test_a_collage_can_be_edited_with_its_mask(shelf, network):
    assert main(["compose", "target.png", "--patch", "source.png@0,0,5,5", "-o", "g.png", "--mask-out", "m.png"]) == 0
    assert main(["edit", "g.png", "--mask", "m.png", "-o", "o.png", "-m", str(network), "--steps", "1"]) == 0
    changed = (np.asarray(Image.open("o.png")) != np.asarray(Image.open("g.png"))).any(axis=2)
    assert changed.any()
    assert not changed[np.asarray(Image.open("m.png")) == 0].any()


FORM = "is not SOURCE@X,Y,WIDTH,HEIGHT"


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["--patch", "source.png"], 2, f"--patch source.png: {FORM}"),
        (["--patch", "source.png@1,2,3"], 2, FORM),
        (["--patch", "source.png@1,2,3,-4"], 2, FORM),
        (["--patch", "source.png@1,2,3,4:5"], 2, FORM),
        (["--patch", "source.png@1.5,2,3,4"], 2, FORM),
        (["--patch", "@1,2,3,4"], 2, FORM),
        (["--patch", f"source.png@{'9' * 5000},2,3,4"], 2, FORM),
        (["--patch", "source.png@1,2,0,4"], 2, "a patch of 0x4 pixels"),
        (["--patch", "source.png@8,0,5,4"], 1, "source.png: is 12x10; a patch of 5x4 from 8,0 is not inside it"),
        (["--patch", "source.png@0,0,5,4:16,0"], 1, "target.png: is 20x16; a patch of 5x4 to 16,0 is not inside it"),
        (["--patch", "none.png@0,0,5,4"], 1, "none.png: no such file"),
        (["--patch", "source.png@0,0,5,4", "--grow", "-1"], 2, "grow is -1; wanted a whole number from 0"),
        (["--patch", "source.png@0,0,5,4", "--blend", "alpha"], 2, "unknown blend 'alpha'"),
        (["--patch", "source.png@0,0,5,4", "--mask-out", "./g.png"], 2, "named for the collage and for the mask"),
        (["--patch", "source.png@0,0,5,4", "--mask-out", "source.png"], 1, "source.png: would overwrite an input"),
        (["--patch", "source.png@0,0,2,2", "--blend", "poisson"], 2, "too small for Poisson blending"),
    ],
)
def test_what_is_refused_is_told_and_nothing_written(words, code, error, shelf, capsys):
    assert main(["compose", "target.png", *words, "-o", "g.png"]) == code
    told = capsys.readouterr()
    assert error in told.err.splitlines()[-2]
    assert told.err.splitlines()[-1].startswith("hint: ")
    assert told.out == ""
    assert sorted(path.name for path in shelf.iterdir()) == ["elsewhere", "source.png", "target.png"]


def test_without_opencv_a_blend_names_the_extra(shelf, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert main(["compose", "target.png", "--patch", "source.png@0,0,5,4", "-o", "g.png", "--blend", "laplacian"]) == 1
    assert "hint: pip install 'sdedit-engine[compose]'" in capsys.readouterr().err
