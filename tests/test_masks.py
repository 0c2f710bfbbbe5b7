"""Masks: what is kept stays byte for byte, the edit lands where it was read, the loop follows the formula."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit import image
from sdedit.cli.main import main
from sdedit.image import Placement

CHANNELS, HEIGHT, WIDTH = 3, 8, 12
PAINT = 204  # what the paint model makes of everything

SIZES = {  # of the guide, (width, height)
    "the model's size": (12, 8),
    "larger and wider": (41, 13),
    "larger and taller": (17, 40),
    "smaller": (5, 3),
    "smaller, taller": (3, 7),
    "wider but lower": (29, 4),
    "one pixel": (1, 1),
}
DOTS = {  # (rows, columns) to repaint: no window of the model's aspect is too small for these
    "a pixel inside": (slice(1, 2), slice(2, 3)),
    "top left corner": (slice(0, 1), slice(0, 1)),
    "top right corner": (slice(0, 1), slice(-1, None)),
    "bottom left corner": (slice(-1, None), slice(0, 1)),
    "bottom right corner": (slice(-1, None), slice(-1, None)),
    "two pixels of the left edge": (slice(1, 3), slice(0, 1)),
}
LINES = {
    "a column": (slice(None), slice(2, 3)),
    "the right edge": (slice(None), slice(-1, None)),
    "a row": (slice(1, 2), slice(None)),
    "the bottom edge": (slice(-1, None), slice(None)),
    "every other column": (slice(None), slice(None, None, 2)),
    "opposite corners": (slice(None, None, 10**6), slice(None, None, 10**6)),
    "everything": (slice(None), slice(None)),
}
WHERE_FITS_APPLY = [("exact", "the model's size")] + [(f, s) for f in ("crop", "pad", "stretch") for s in SIZES]

Regions = dict[str, tuple[slice, slice]]
Exact = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mask_of(region: tuple[slice, slice], size: tuple[int, int], level: int = 255) -> np.ndarray:
    mask = np.zeros(size[::-1], np.uint8)
    mask[region] = level
    return mask


def centre(size: tuple[int, int]) -> np.ndarray:
    """A mask of one repainted pixel, the middle one."""
    rows, columns = slice(size[1] // 2, size[1] // 2 + 1), slice(size[0] // 2, size[0] // 2 + 1)
    return mask_of((rows, columns), size)


@pytest.fixture(scope="module")
def painter(paint):
    return sdedit.load(paint, backend="ort-cpu", threads=1)


@pytest.fixture(scope="module")
def inverter(negative):
    return sdedit.load(negative, backend="ort-cpu", threads=1)


# --- The picture as the model sees it -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12, 3), (5, 7, 3), (9, 31, 3), (8, 20, 3), (13, 12, 3), (8, 12, 1)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_channel_is_resized_and_padded_by_itself(shape, fit):
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    guide = image.read(pixels, shape[2])
    placement = image.place(guide, (WIDTH, HEIGHT), fit)
    x = image.to_model(guide, placement)
    assert (x.shape, x.dtype, x.flags.c_contiguous) == ((shape[2], HEIGHT, WIDTH), np.float32, True)
    for channel, plane in enumerate(x):
        grey = image.read(Image.fromarray(pixels[..., channel]), 1)
        np.testing.assert_array_equal(plane, image.to_model(grey, placement)[0])
        left, top, right, bottom = placement.part
        inner = plane[top:bottom, left:right]
        np.testing.assert_array_equal(plane, np.pad(inner, ((top, HEIGHT - bottom), (left, WIDTH - right)), "edge"))
        levels = (plane + 1) * np.float32(127.5)
        np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
        window = grey.pixels[placement.window[1] : placement.window[3], placement.window[0] : placement.window[2], 0]
        if window.shape == inner.shape:
            np.testing.assert_array_equal(levels[top:bottom, left:right].round(), window)


def test_an_array_given_as_a_guide_is_copied():
    pixels = np.zeros((4, 5, 3), np.uint8)
    guide = image.read(pixels, 3)
    pixels[...] = 9
    assert not guide.pixels.any()
    assert (guide.label, guide.sha256, guide.notes) == ("the guide", None, ())


# --- The written picture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "size"), WHERE_FITS_APPLY)
def test_kept_pixels_of_the_png_are_the_guides_bytes(fit, size, paint, picture, write_png, tmp_path):
    size = SIZES[size]
    guide = picture(*size)
    masks = [mask_of(region, size) for region in (DOTS if fit == "crop" else DOTS | LINES).values()]
    files = [str(write_png(f"mask-{i}.png", mask)) for i, mask in enumerate(masks)]
    command = ["edit", *[str(write_png("guide.png", guide))] * len(masks), "-o", str(tmp_path / "out.png")]
    given = [word for file in files for word in ("--mask", file)]
    assert main([*command, *given, "-m", str(paint), "--fit", fit, "--steps", "2", "--backend", "ort-cpu"]) == 0
    for i, mask in enumerate(masks):
        written = np.asarray(Image.open(tmp_path / f"out-{i:03d}.png"))
        assert written.shape == guide.shape
        assert np.array_equal(written[mask == 0], guide[mask == 0])
        assert np.all(np.abs(written[mask == 255].astype(int) - PAINT) <= 1)


@pytest.mark.parametrize(("fit", "size"), WHERE_FITS_APPLY)
def test_an_all_black_mask_returns_the_guide(fit, size, painter, picture):
    guide = picture(*SIZES[size])
    result = painter.edit(guide, mask=np.zeros(guide.shape[:2], np.uint8), fit=fit, steps=2, repeats=2)
    assert np.array_equal(result.results[0].pixels, guide)


def test_what_is_kept_stays_beside_a_networks_largest_numbers(picture):
    guide, mask = image.read(picture(8, 8), 3), np.zeros((8, 8), np.float32)
    mask[:, :2] = 1
    x = np.full((3, 8, 8), 1e37, np.float32)  # finite; 127.5 times it is not
    pasted = image.paste(guide, mask, x, image.place(guide, (8, 8), "crop"))
    assert np.array_equal(pasted[:, 2:], guide.pixels[:, 2:])
    assert (pasted[:, :2] == 255).all()


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
def test_an_all_white_mask_equals_no_mask_bit_for_bit(sampler, repeats, editor, picture):
    guide = picture(WIDTH, HEIGHT)
    options = {"sampler": sampler, "repeats": repeats, "steps": 5, "samples": 3, "seed": 11}
    plain = editor.edit(guide, **options)
    masked = editor.edit(guide, mask=np.full((HEIGHT, WIDTH), 255, np.uint8), **options)
    assert masked.x.tobytes() == plain.x.tobytes()
    for one, other in zip(masked.results, plain.results, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_an_all_white_mask_writes_the_same_npy_and_the_same_pixels(network, picture, write_png, tmp_path):
    guide = str(write_png("guide.png", picture(WIDTH, HEIGHT)))
    mask = str(write_png("mask.png", np.full((HEIGHT, WIDTH), 255, np.uint8)))
    command = ["edit", guide, "-m", str(network), "--steps", "4", "--repeats", "2", "--backend", "ort-cpu"]
    for suffix in (".npy", ".png"):
        assert main([*command, "-o", str(tmp_path / f"plain{suffix}")]) == 0
        assert main([*command, "-o", str(tmp_path / f"masked{suffix}"), "--mask", mask]) == 0
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "masked.npy").read_bytes()
    plain, masked = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "masked"))
    assert np.array_equal(plain, masked)


def test_soft_pixels_are_the_guide_plus_omega_times_the_change(editor, picture):
    guide = picture(WIDTH, HEIGHT)
    mask = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    result = editor.edit(guide, mask=mask, steps=3, sampler="ddim").results[0]
    assert np.abs(result.x).max() < 1, "the edit must need no clipping here"
    edit = (np.moveaxis(result.x, 0, 2).astype(np.float64) + 1) * 127.5
    blended = guide + mask[..., None] / 255 * (edit - guide)
    assert np.abs(result.pixels - blended).max() < 0.51


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("size", [(51, 9), (7, 31)])
def test_a_soft_edge_rises_evenly_from_the_guide_to_the_edit(size, fit, painter):
    guide = np.full((size[1], size[0], 3), 30, np.uint8)
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    out = painter.edit(guide, mask=np.tile(ramp, (size[1], 1)), fit=fit, steps=2).results[0].pixels
    assert np.abs(out[:, :, 0] - (30 + ramp / 255 * (PAINT - 30))).max() < 1.01
    assert np.all(np.diff(out.astype(int), axis=1) >= 0)
    assert np.all(out[:, 0] == 30)
    assert np.all(np.abs(out[:, -1].astype(int) - PAINT) <= 1)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(12, 8), (48, 32), (45, 20), (22, 40), (6, 4)])
def test_the_edit_lands_on_the_pixels_it_was_made_from(size, fit, inverter):
    width, height = size
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    guide = np.stack([2 * columns, 2 * rows, columns + rows], axis=2).astype(np.uint8)
    mask = mask_of((slice(height // 4, height // 2), slice(width // 3, width // 2)), size)
    out = inverter.edit(guide, mask=mask, fit=fit, t0=0.01, steps=1).results[0].pixels.astype(int)
    repainted = mask == 255
    assert np.abs(out - (255 - guide.astype(int)))[repainted].max() <= 4
    assert np.array_equal(out[~repainted], guide[~repainted])


# --- The crop window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 10), (15, 60)], ids=["wide", "tall"])
@pytest.mark.parametrize("at", ["start", "middle", "end", "as long as the window"])
def test_the_crop_window_moves_over_the_mask(size, at, inverter):
    long = size[0] if size[0] > size[1] else size[1]
    window = 15 if size[0] > size[1] else 10  # the largest of aspect 12 : 8
    span = {
        "start": slice(0, 4),
        "middle": slice(28, 32),
        "end": slice(long - 4, long),
        "as long as the window": slice(long - window - 3, long - 3),
    }[at]
    region = (slice(2, 7), span) if size[0] > size[1] else (span, slice(2, 12))
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    guide = np.stack([2 * columns, 2 * rows, columns + rows], axis=2).astype(np.uint8)
    mask = mask_of(region, size)
    out = inverter.edit(guide, mask=mask, t0=0.01, steps=1).results[0].pixels.astype(int)
    assert np.abs(out - (255 - guide.astype(int)))[mask == 255].max() <= 4
    assert np.array_equal(out[mask == 0], guide[mask == 0])


def test_without_a_mask_the_crop_window_is_centred(inverter):
    guide = np.zeros((10, 60, 3), np.uint8)
    guide[:, 22:37] = 200  # the largest window of aspect 12 : 8 is 15 pixels wide
    out = inverter.edit(guide, t0=0.01, steps=1).results[0].pixels
    assert out.shape == (HEIGHT, WIDTH, 3)
    assert np.all(np.abs(out[:, 1:-1].astype(int) - 55) <= 3)


@pytest.mark.parametrize(
    ("size", "region"),
    [((60, 10), (slice(5, 6), slice(20, 36))), ((15, 60), (slice(0, 60, 59), slice(7, 8)))],
    ids=["one pixel too wide", "both ends of a tall guide"],
)
def test_a_mask_that_no_crop_window_covers_is_refused(size, region, painter, picture):
    guide, mask = picture(*size), mask_of(region, size, level=1)  # the faintest grey counts
    with pytest.raises(sdedit.ImageError, match="mask spans") as refused:
        painter.edit(guide, mask=mask, steps=1)
    assert "pad" in refused.value.hint
    assert "stretch" in refused.value.hint
    for fit in ("pad", "stretch"):
        assert painter.edit(guide, mask=mask, fit=fit, steps=1).images[0].size == size


# --- The composite inside the loop -------------------------------------------------------------------------------


def reference(
    exact: Exact, guide: np.ndarray, omega: np.ndarray, table: sdedit.StepTable, seed: int, repeats: int
) -> list[np.ndarray]:
    """Every D of the masked loop, in float64, as the formulas stand on paper."""
    noise = sdedit.Noise([seed], guide.shape)

    def z(step: int, repeat: int, stream: int) -> np.ndarray:
        return noise(step, repeat, stream)[0].astype(np.float64)

    seen: list[np.ndarray] = []
    start = guide
    for repeat in range(repeats):
        x = start + table.rows[0, 0] * z(0, repeat, 0)
        for n, (sigma, a, b, c, d, sigma_next) in enumerate(table.rows, start=1):
            previous = seen[-1] if n > 1 else 0.0
            seen.append(exact(x[None], np.array([sigma]))[0])
            x = a * x + b * seen[-1] + d * (seen[-1] - previous) + c * z(n, repeat, 0)
            x = guide + omega * (x - guide) + sigma_next * np.sqrt(1 - omega**2) * z(n, repeat, 1)
        start = guide + omega * (seen[-1] - guide)
    return seen


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
def test_every_estimate_of_a_masked_edit_follows_the_formula(sampler, repeats, textured, picture):
    path, exact = textured
    guide = picture(WIDTH, HEIGHT)
    mask = np.random.default_rng(4).choice(np.array([0, 60, 128, 200, 255], np.uint8), (HEIGHT, WIDTH))
    editor = sdedit.load(path, backend="ort-cpu", threads=1)
    seen: list[np.ndarray] = []
    editor.edit(
        guide,
        mask=mask,
        on_step=lambda progress: seen.append(progress.step.denoised[0].copy()),
        **{"sampler": sampler, "repeats": repeats, "t0": 0.6, "steps": 4, "seed": 21},
    )
    table = sdedit.plan(editor.sde, t0=0.6, steps=4, sampler=sampler)
    wanted = reference(exact, np.moveaxis(guide / 127.5 - 1, 2, 0), mask / 255, table, 21, repeats)
    assert len(seen) == len(wanted) == 4 * repeats
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=2e-5)


def halved(mask: np.ndarray) -> np.ndarray:
    """The means of 2 x 2 blocks."""
    return mask.reshape(HEIGHT, 2, WIDTH, 2).mean(axis=(1, 3))


def doubled(mask: np.ndarray) -> np.ndarray:
    """Linear interpolation between pixel centres along both axes; constant beyond the outer ones."""
    for axis, size in enumerate(mask.shape):
        at = (np.arange(2 * size) + 0.5) / 2 - 0.5
        mask = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, mask)
    return mask


def padded(mask: np.ndarray) -> np.ndarray:
    """Kept margins left and right of a picture that is half as wide as the frame."""
    return np.pad(mask, ((0, 0), (WIDTH // 4, WIDTH // 4)))


@pytest.mark.parametrize(
    ("size", "fit", "resized"),
    [
        ((2 * WIDTH, 2 * HEIGHT), "crop", halved),
        ((WIDTH // 2, HEIGHT // 2), "crop", doubled),
        ((WIDTH // 2, HEIGHT), "pad", padded),
    ],
    ids=["down", "up", "pad"],
)
def test_the_mask_is_box_filtered_down_interpolated_up_and_padded_with_kept(size, fit, resized, textured):
    path, exact = textured
    guide = np.full((size[1], size[0], 3), (30, 90, 200), np.uint8)  # constant: the guide's own filter is not asked
    mask = np.random.default_rng(5).choice(np.array([0, 255], np.uint8), size[::-1])
    editor = sdedit.load(path, backend="ort-cpu", threads=1)
    seen: list[np.ndarray] = []
    editor.edit(
        guide,
        mask=mask,
        on_step=lambda progress: seen.append(progress.step.denoised[0].copy()),
        **{"t0": 0.6, "steps": 3, "fit": fit},
    )
    model_guide = np.broadcast_to((guide[0, 0] / 127.5 - 1)[:, None, None], (CHANNELS, HEIGHT, WIDTH))
    wanted = reference(exact, model_guide, resized(mask / 255), sdedit.plan(editor.sde, t0=0.6, steps=3), 0, 1)
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("size", "frame"), [(100, 72), (500, 384), (2000, 384), (1000, 768), (97, 64), (7, 6)])
@pytest.mark.parametrize("upright", [False, True])
def test_every_pixel_of_a_mask_counts_in_one_place(size, frame, upright):
    guide = (4, size) if upright else (size, 4)
    placed = (2, frame) if upright else (frame, 2)
    placement = Placement((0, 0, *guide), (0, 0, *placed), placed)
    found = []
    for at in range(size):
        mask = np.zeros(guide[::-1], np.float32)
        mask[at if upright else slice(None), slice(None) if upright else at] = 1
        line = image.mask_to_model(mask, placement)[0].max(axis=int(upright))
        (place,) = np.flatnonzero(line)
        centre = (at + 0.5) * frame / size
        assert place == int(centre) or place == centre - 1  # or left of the boundary that it lies on
        found.append((place, line[place]))
    places = [place for place, _ in found]
    assert all(weight == np.float32(1 / places.count(place)) for place, weight in found)


def test_a_thin_mask_still_repaints_when_the_guide_is_much_larger(textured):
    guide = np.full((8 * 9, 12 * 9, 3), 60, np.uint8)
    mask = mask_of((slice(None), slice(50, 51)), (12 * 9, 8 * 9))
    editor = sdedit.load(textured[0], backend="ort-cpu", threads=1)
    masked, kept = (editor.edit(guide, mask=m, t0=0.9, steps=5, repeats=3).x[0] for m in (mask, 0 * mask))
    touched = np.abs(masked - kept).max(axis=(0, 1)) > 0
    assert touched.tolist() == [column == 50 // 9 for column in range(WIDTH)]


@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
def test_the_loop_alone_follows_the_formula_in_float64(sampler, textured):
    exact = textured[1]
    generator = np.random.default_rng(6)
    guide = generator.uniform(-1, 1, (1, CHANNELS, HEIGHT, WIDTH))
    omega = generator.uniform(0, 1, (1, 1, HEIGHT, WIDTH))
    table = sdedit.plan(sdedit.VP(0.1, 20.0), t0=0.7, steps=6, sampler=sampler)
    noise = sdedit.Noise([2**64 - 1], guide.shape[1:])
    edited = sdedit.denoise(exact, sdedit.perturb(guide, table, noise), table, noise, guide=guide, mask=omega)
    wanted = reference(exact, guide[0], omega[0], table, 2**64 - 1, 1)[-1]
    np.testing.assert_allclose(edited[0], wanted, rtol=0, atol=1e-12)


KEEPS_THE_LEVEL = ["ancestral", "er-sde", "dpmpp-2m-sde", "ddim"]  # with D = x0 their x has std σ' exactly


@pytest.mark.parametrize(
    ("sampler", "omega"),
    [(s, 0.0) for s in sdedit.SAMPLERS] + [(s, o) for s in KEEPS_THE_LEVEL for o in (0.3, 0.7, 1.0)],
)
def test_after_a_step_a_pixel_has_the_noise_of_the_level_just_reached(sampler, omega):
    guide = np.zeros((40, 1, HEIGHT, 2 * WIDTH))
    guide[:, :, ::2] = 0.8
    states: list[np.ndarray] = []

    def knows_the_answer(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        states.append(x.copy())
        return guide

    table = sdedit.plan(sdedit.VP(0.1, 20.0), t0=0.6, steps=4, sampler=sampler)
    noise = sdedit.Noise(range(100, 100 + len(guide)), guide.shape[1:])
    x = sdedit.perturb(guide, table, noise)
    sdedit.denoise(knows_the_answer, x, table, noise, guide=guide, mask=np.full((1, 1, 1, 1), omega))
    for state, sigma_next in zip(states[1:], table.column("sigma_next"), strict=False):
        residue = (state - guide) / sigma_next  # 7680 standard normals: their mean within 0.011, their std within 0.008
        assert abs(residue.mean()) < 0.05
        assert abs(residue.std() - 1) < 0.04


def test_the_last_step_returns_the_networks_estimate_and_no_composite(editor, picture):
    guide = picture(WIDTH, HEIGHT)
    seen: list[np.ndarray] = []
    result = editor.edit(
        guide, mask=centre((WIDTH, HEIGHT)), steps=2, on_step=lambda p: seen.append(p.step.denoised.copy())
    )
    assert np.array_equal(result.x, seen[-1])


# --- Several guides ----------------------------------------------------------------------------------------------


def test_one_mask_serves_all_guides(editor, picture):
    guides = [picture(20, 14, seed) for seed in range(3)]
    mask = centre((20, 14))
    together = editor.edit(guides, mask=mask, steps=3, seed=5)
    for j, guide in enumerate(guides):
        alone = editor.edit(guide, mask=mask, steps=3, seed=5 + j)
        assert np.array_equal(together.results[j].pixels, alone.results[0].pixels)
        assert np.array_equal(together.x[j], alone.x[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_each_guide_may_have_its_own_mask_and_size(batch, painter, picture):
    sizes = [(20, 14), (9, 30), (5, 5)]
    guides = [picture(*size) for size in sizes]
    masks = [centre(size) for size in sizes]
    result = painter.edit(guides, mask=masks, samples=2, steps=2, batch=batch)
    for j, one in enumerate(result.results):
        guide, kept = guides[j // 2], masks[j // 2] == 0
        assert np.array_equal(one.pixels[kept], guide[kept])
        assert np.all(np.abs(one.pixels[~kept].astype(int) - PAINT) <= 1)
