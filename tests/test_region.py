"""Windows of a frame: which are chosen, and that they change nothing but the cost."""

import json
import subprocess
import sys

import numpy as np
import pytest
from closed_form import SDES, metadata, save
from onnx import TensorProto, helper
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sdedit
from sdedit import record
from sdedit.region import Window, windows

SIDE, MULTIPLE = 64, 8


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A model of any size that looks at each pixel by itself: D = tanh(x / (1 + σ))."""
    described = metadata((3, SIDE, SIDE), SDES["vp"], defaults={"steps": 4})
    described["image"] |= {"dynamic": True, "multiple": MULTIPLE}
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Add", ["s", "one"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["denoised"]),
    ]
    weights = {"column": np.array([-1, 1, 1, 1], np.int64), "one": np.array(1, np.float32)}
    sizes = (TensorProto.FLOAT, ["B", 3, "H", "W"])
    return save(
        tmp_path_factory.mktemp("free") / "free.onnx",
        nodes,
        weights,
        described,
        inputs={"x": sizes, "sigma": (TensorProto.FLOAT, ["B"])},
        outputs={"denoised": sizes},
    )


@pytest.fixture
def any_size(free, monkeypatch):
    """An editor of that model, and the (batch, size) of every executor it asks its backend for."""
    editor = sdedit.load(free, backend="ort-cpu", threads=1)
    asked, plain = [], editor.backend.executor

    def executor(batch, conditions, size=None):
        asked.append((batch, size))
        return plain(batch, conditions, size)

    monkeypatch.setattr(editor.backend, "executor", executor)
    return editor, asked


def spot(*boxes, side=SIDE):
    """A mask that repaints these (left, top, right, bottom)."""
    mask = np.zeros((side, side), np.uint8)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 255
    return mask


def omega(*boxes):
    return spot(*boxes).astype(np.float32) / 255


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (60, 60, 64, 64), (20, 30, 29, 41), (31, 0, 32, 64)])
def test_a_window_holds_the_mask_and_its_margin_in_a_size_that_the_network_takes(box):
    (window,) = windows(omega(box), MULTIPLE)
    left, top, right, bottom = window.box
    assert window.part == box
    assert window.size[0] % MULTIPLE == 0
    assert window.size[1] % MULTIPLE == 0
    assert min(window.size) >= SIDE / 2
    assert 0 <= left <= max(0, box[0] - 4)
    assert 0 <= top <= max(0, box[1] - 4)
    assert SIDE >= right >= min(SIDE, box[2] + 4)
    assert SIDE >= bottom >= min(SIDE, box[3] + 4)


def test_parts_far_from_each_other_get_windows_of_their_own():
    side = 128
    boxes = [(0, 0, 6, 6), (110, 100, 116, 120)]
    mask = spot(*boxes, side=side).astype(np.float32)
    assert [window.part for window in windows(mask, MULTIPLE)] == boxes
    assert [window.size for window in windows(mask, MULTIPLE)] == [(64, 64), (64, 64)]


def test_parts_within_both_margins_share_a_window():
    assert [window.part for window in windows(omega((20, 20, 24, 24), (32, 20, 36, 24)), MULTIPLE)] == [
        (20, 20, 36, 24)
    ]
    assert len(windows(omega((4, 20, 8, 24), (17, 20, 20, 24)), MULTIPLE)) == 2  # a gap of 9, more than 4 + 4


@pytest.mark.parametrize(
    "mask", [omega((0, 0, 64, 64)), omega(), omega((0, 0, 2, 2), (62, 0, 64, 2), (0, 62, 2, 64)), omega((4, 4, 50, 50))]
)
def test_where_windows_would_not_be_cheaper_the_frame_is_edited(mask):
    assert windows(mask, MULTIPLE) == []


@pytest.mark.parametrize("sampler", ["em", "dpmpp-2m-sde"])
@pytest.mark.parametrize("boxes", [[(20, 30, 31, 41)], [(0, 0, 5, 5), (50, 52, 64, 64)]])
def test_windows_make_the_pixels_of_the_full_frame(any_size, picture, sampler, boxes):
    editor, asked = any_size
    guide, mask = picture(SIDE, SIDE), spot(*boxes)
    mask[mask > 0] -= np.arange(np.count_nonzero(mask), dtype=np.uint8) % 100  # soft, too
    edits = {"mask": mask, "sampler": sampler, "seed": 5, "samples": 3, "repeats": 2, "batch": 2}
    full = editor.edit(guide, **edits)
    assert asked == [(2, None)]
    windowed = editor.edit(guide, **edits, region="auto")
    assert asked[1:] == [(2, (32, 32))]
    for one, other in zip(full.results, windowed.results, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.x[:, mask > 0], other.x[:, mask > 0])
    assert windowed.timings.evaluations == -(-3 * len(boxes) // 2) * 2 * 4


def test_outside_its_windows_x_is_the_guide(any_size):
    editor, _ = any_size
    guide = np.full((SIDE, SIDE, 3), 51, np.uint8)
    x = editor.edit(guide, mask=spot((0, 0, 8, 8)), region="auto").x[0]
    assert np.all(x[:, 32:] == np.float32(51 / 127.5 - 1))
    assert np.any(x[:, :32, :32] != x[0, -1, -1])


def test_windows_of_a_larger_guide_keep_its_other_pixels(any_size, picture):
    editor, asked = any_size
    guide, mask = picture(200, 150), np.zeros((150, 200), np.uint8)
    mask[40:60, 100:130] = 255
    out = editor.edit(guide, mask=mask, region="auto", fit="stretch").results[0].pixels
    assert asked == [(1, (32, 32))]
    assert np.array_equal(out[mask == 0], guide[mask == 0])
    assert np.mean(out[mask > 0] != guide[mask > 0]) > 0.5


def test_a_result_does_not_depend_on_the_other_masks_of_a_run(any_size, picture):
    editor, asked = any_size
    guides, masks = [picture(SIDE, SIDE, seed=n) for n in range(3)], [spot((0, 0, 9, 9)), spot((8, 8, 48, 20)), spot()]
    together = editor.edit(guides, mask=masks, region="auto", seed=3)
    assert asked == [(1, (32, 32)), (1, (48, 32)), (1, None)]
    for n in range(3):
        alone = editor.edit(guides[n], mask=masks[n], region="auto", seed=3 + n)
        assert np.array_equal(alone.x[0], together.x[n])


def test_progress_counts_the_evaluations_of_all_windows(any_size, picture):
    editor, _ = any_size
    seen = []

    def on_step(progress):
        seen.append((progress.done, progress.total))
        (preview,) = progress.preview()
        assert preview.size == (SIDE, SIDE)

    masks = [spot((0, 0, 9, 9)), spot((8, 8, 48, 20))]
    editor.edit([picture(SIDE, SIDE)] * 2, mask=masks, region="auto", on_step=on_step)
    assert seen == [(n, 8) for n in range(1, 9)]


def test_a_budget_reckons_with_the_largest_window(any_size, picture):
    editor, asked = any_size
    masks = [spot((0, 0, 9, 9)), spot((8, 8, 48, 20))]
    editor.edit([picture(SIDE, SIDE)] * 2, mask=masks, region="auto", max_ms=1e6, steps=1)
    assert asked[0] == (1, (48, 32))


def test_without_a_mask_or_for_a_fixed_size_the_frame_is_edited(any_size, editor, picture):
    free_editor, asked = any_size
    free_editor.edit(picture(SIDE, SIDE), region="auto")
    assert asked == [(1, None)]
    guide, mask = picture(12, 8), np.zeros((8, 12), np.uint8)
    mask[:2, :2] = 255
    full, windowed = (editor.edit(guide, mask=mask, steps=3, region=region).x for region in ("full", "auto"))
    assert np.array_equal(full, windowed)


def test_a_backend_that_cannot_edits_the_frame(any_size, picture, monkeypatch):
    editor, asked = any_size
    monkeypatch.setattr(editor.backend, "takes_windows", False)
    editor.edit(picture(SIDE, SIDE), mask=spot((0, 0, 9, 9)), region="auto")
    assert asked == [(1, None)]


def test_an_unknown_region_is_an_error(editor, picture):
    with pytest.raises(sdedit.OptionError, match="unknown region 'half'") as caught:
        editor.edit(picture(12, 8), region="half")
    assert caught.value.hint == "choose one of full, auto"


def test_a_folder_is_edited_in_whole_frames(editor, tmp_path):
    with pytest.raises(sdedit.OptionError, match="whole frames"):
        sdedit.edit_folder(editor, tmp_path, tmp_path / "out", region="auto")


def test_a_window_is_recorded_and_replayed(free, picture, write_png, tmp_path):
    guide, mask = write_png("guide.png", picture(SIDE, SIDE)), write_png("mask.png", spot((0, 0, 9, 9)))
    command = [sys.executable, "-m", "sdedit.cli.main", "edit", str(guide), "--mask", str(mask), "-m", str(free)]
    subprocess.run([*command, "-o", "out.png", "--region", "auto"], check=True, cwd=tmp_path, capture_output=True)
    assert record.read(tmp_path / "out.png").options.region == "auto"
    subprocess.run([*command, "-o", "same.png", "--replay", "out.png"], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    refused = subprocess.run(
        [*command, "-o", "no.png", "--replay", "out.png", "--region", "full"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "--region" in refused.stderr


def test_prepared_guides_are_edited_as_whole_frames(editor, picture):
    with (
        pytest.raises(sdedit.OptionError, match="edited as whole frames"),
        sdedit.open_tuner(editor, [picture(12, 8)], region="auto"),
    ):
        pass


def test_a_record_from_before_there_were_regions_is_a_full_frame(free, picture, write_png, tmp_path):
    guide = write_png("guide.png", picture(SIDE, SIDE))
    editor = sdedit.load(free, backend="ort-cpu", threads=1)
    told = record.make(editor, editor.edit(guide), 0)
    del told["options"]["region"]
    info = PngInfo()
    info.add_itxt(record.KEYWORD, json.dumps(told))
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png", pnginfo=info)
    assert record.read(tmp_path / "old.png").options.region == "full"


def test_window_size():
    assert Window((1, 2, 33, 26), (5, 5, 6, 6)).size == (32, 24)
