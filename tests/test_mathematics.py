"""The engine computes what its mathematics says: every schedule and sampler against the slow oracle."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import closed_form
import numpy as np
import oracle
import pytest
from PIL import Image

import sdedit
from sdedit.cli.main import main
from sdedit.noise import philox4x32
from sdedit.sde import from_metadata

TOLERANCE = 2e-5  # of the largest value: the engine's loop is float32
SDES = list(closed_form.SDES)
SAMPLERS: list[tuple[str, float | None]] = [
    ("em", None),
    ("ancestral", None),
    ("ddim", None),
    ("ddim", 0.6),
    ("ddim", 1.0),
    ("dpmpp-2m-sde", None),
    ("dpmpp-2m-sde", 0.0),
    ("dpmpp-2m-sde", 0.5),
    ("er-sde", None),
]
every_sde = pytest.mark.parametrize("kind", SDES)
every_sampler = pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)


class Edit(NamedTuple):
    """One edit's options; shapes have element counts 1, 1, 2 and 3 above a multiple of 4."""

    shape: tuple[int, int, int]
    t0: float
    steps: int
    seed: int
    repeats: int


EDITS = [
    pytest.param(Edit((3, 5, 7), 0.5, 6, 2**64 - 1, 1), id="half-way"),
    pytest.param(Edit((1, 3, 3), 1.0, 4, 7, 2), id="from-the-top-twice"),
    pytest.param(Edit((1, 2, 5), 0.31, 9, 2**32, 3), id="three-repeats"),
    pytest.param(Edit((3, 3, 3), 0.04, 1, 12345678901234567890, 1), id="one-step"),
]


def pixels(shape: tuple[int, ...], number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def write_png(path: Path, values: np.ndarray) -> Path:
    """values: (C, H, W) uint8, or (H, W)."""
    Image.fromarray(values if values.ndim == 2 else values.transpose(1, 2, 0).squeeze()).save(path)
    return path


def to_data(values: np.ndarray) -> np.ndarray:
    return values / 127.5 - 1


def write_model(folder: Path, name: str, kind: str, shape: tuple[int, int, int]) -> tuple[Path, Callable[..., Any]]:
    """An artifact with a closed-form denoiser, and D(x, σ) of one image in float64."""
    path, sde = folder / f"{name}.onnx", closed_form.SDES[kind]
    if name == "identity":
        return closed_form.identity(path, sde, shape), lambda x, sigma: x
    mean = np.random.default_rng(0).uniform(-1, 1, shape)
    _, exact = closed_form.gaussian(path, sde, mean, 0.4)
    return path, lambda x, sigma: exact(x[None], sigma)[0]


def arguments(edit: Edit, sampler: str, eta: float | None) -> list[str]:
    listed = ["--t0", edit.t0, "--steps", edit.steps, "--seed", edit.seed, "--repeats", edit.repeats]
    listed += ["--sampler", sampler] + ([] if eta is None else ["--eta", eta])
    return [str(value) for value in listed]


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def check_command_line(
    folder: Path,
    denoiser: str,
    kind: str,
    sampler: str,
    eta: float | None,
    edit: Edit,
    *,
    run: Callable[[list[str]], int] = main,
    guides: int = 2,
    samples: int = 2,
    mask: np.ndarray | None = None,
) -> None:
    """Edit with the command line, and compare every result with the oracle's."""
    model, exact = write_model(folder, denoiser, kind, edit.shape)
    drawn = [pixels(edit.shape, number) for number in range(guides)]
    files = [str(write_png(folder / f"guide{number}.png", guide)) for number, guide in enumerate(drawn)]
    masked = [] if mask is None else ["--mask", str(write_png(folder / "mask.png", mask))]
    out = folder / "out.npy"
    command = ["edit", *files, "-m", str(model), "-o", str(out), "-n", str(samples), "--threads", "1"]
    assert run([*command, *masked, *arguments(edit, sampler, eta)]) == 0

    got = np.load(out)
    assert got.dtype == np.float32
    rows = oracle.table(closed_form.SDES[kind], edit.t0, edit.steps, sampler, eta)
    omega = None if mask is None else mask / 255
    wanted = [
        oracle.edit(exact, to_data(guide), rows, (edit.seed + j) % 2**64, repeats=edit.repeats, mask=omega)
        for j, guide in enumerate(np.repeat(drawn, samples, axis=0))
    ]
    assert_close(got, np.array(wanted))


# --- the command line ------------------------------------------------------------------------------------------------


@every_sde
@every_sampler
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_equals_the_recursion(tmp_path: Path, kind: str, sampler: str, eta: float | None, edit: Edit) -> None:
    check_command_line(tmp_path, "gaussian", kind, sampler, eta, edit)


@every_sde
@every_sampler
def test_an_edit_with_a_denoiser_that_changes_nothing_keeps_all_its_noise(
    tmp_path: Path, kind: str, sampler: str, eta: float | None
) -> None:
    edit = Edit((3, 5, 7), 0.45, 7, 2**64 - 2, 2)
    check_command_line(tmp_path, "identity", kind, sampler, eta, edit, guides=1)


@every_sde
@every_sampler
def test_an_edit_with_a_soft_mask_equals_the_recursion(
    tmp_path: Path, kind: str, sampler: str, eta: float | None
) -> None:
    mask = pixels((5, 7), 99)
    mask[0, :3], mask[-1, :3] = 0, 255
    edit = Edit((3, 5, 7), 0.6, 5, 3, 2)
    check_command_line(tmp_path, "gaussian", kind, sampler, eta, edit, mask=mask)


@pytest.mark.parametrize(("kind", "sampler"), [("ve", "em"), ("vp-discrete", "er-sde")])
def test_a_process_of_its_own_equals_the_recursion(tmp_path: Path, kind: str, sampler: str) -> None:
    def run(command: list[str]) -> int:
        return subprocess.run([sys.executable, "-m", "sdedit.cli.main", *command], env=dict(os.environ)).returncode

    edit = Edit((3, 5, 7), 0.5, 6, 2**64 - 1, 2)
    check_command_line(tmp_path, "gaussian", kind, sampler, None, edit, run=run)


def test_an_all_white_mask_equals_no_mask_bit_for_bit(tmp_path: Path) -> None:
    model, _ = write_model(tmp_path, "gaussian", "vp", (3, 5, 7))
    guide = str(write_png(tmp_path / "guide.png", pixels((3, 5, 7), 0)))
    white = str(write_png(tmp_path / "white.png", np.full((5, 7), 255, np.uint8)))
    command = ["edit", guide, "-m", str(model), "--steps", "5", "--repeats", "2", "-o"]
    assert main([*command, str(tmp_path / "plain.npy")]) == 0
    assert main([*command, str(tmp_path / "masked.npy"), "--mask", white]) == 0
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "masked.npy").read_bytes()


# --- schedules -------------------------------------------------------------------------------------------------------


@every_sde
@every_sampler
@pytest.mark.parametrize(("t0", "steps"), [(0.5, 1), (0.3, 2), (1.0, 10), (0.123, 7), (0.6, 300)])
def test_plan_has_the_columns_of_the_table(kind: str, sampler: str, eta: float | None, t0: float, steps: int) -> None:
    sde = closed_form.SDES[kind]
    table = sdedit.plan(from_metadata(sde), t0=t0, steps=steps, sampler=sampler, eta=eta)
    wanted = np.array(oracle.table(sde, t0, steps, sampler, eta))
    assert table.rows.shape == (steps, 6)
    for number, name in enumerate(oracle.Row._fields):
        np.testing.assert_allclose(table.column(name), wanted[:, number], rtol=1e-8, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("sampler", ["em", "ancestral", "er-sde"])
def test_eta_of_a_sampler_without_one_is_an_error(sampler: str) -> None:
    with pytest.raises(sdedit.OptionError, match=f"sampler {sampler} has no eta, and eta is 0.5"):
        sdedit.plan(sdedit.VE(0.02, 60.0), sampler=sampler, eta=0.5)


@every_sde
def test_time_inverts_sigma(kind: str) -> None:
    sde = from_metadata(closed_form.SDES[kind])
    t = np.linspace(0, 1, 1234)
    np.testing.assert_allclose(sde.time(sde.sigma(t)), t, rtol=1e-9, atol=1e-12)


@every_sde
def test_sigma_rises_from_zero(kind: str) -> None:
    sigma = from_metadata(closed_form.SDES[kind]).sigma(np.linspace(0, 1, 1234))
    assert sigma[0] == 0
    assert np.all(np.diff(sigma) > 0)


def without_terminal_signal(levels: int) -> dict[str, Any]:
    return {"kind": "vp-discrete", "alphas_cumprod": [*np.linspace(0.9, 0.1, levels - 1).tolist(), 0.0]}


@pytest.mark.parametrize("t0", [1.0, 0.95])
def test_an_edit_from_above_the_last_finite_level_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], t0: float
) -> None:
    model = closed_form.identity(tmp_path / "model.onnx", without_terminal_signal(10), (1, 3, 3))
    guide = write_png(tmp_path / "guide.png", pixels((1, 3, 3), 0))
    command = ["edit", str(guide), "-m", str(model), "-o", str(tmp_path / "out.npy"), "--backend", "ort-cpu"]
    assert main([*command, "--t0", str(t0)]) == 2
    assert capsys.readouterr().err == (
        f"error: t0 is {t0}, where this model's schedule has no signal left (σ is infinite)\nhint: use t0 <= 0.9\n"
    )
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("levels", [3, 7, 10, 1000])
def test_the_t0_that_the_refusal_names_is_accepted(levels: int) -> None:
    sde = from_metadata(without_terminal_signal(levels))
    with pytest.raises(sdedit.OptionError) as refused:
        sdedit.plan(sde, t0=1.0)
    largest = float(refused.value.hint.removeprefix("use t0 <= "))
    assert np.isfinite(sdedit.plan(sde, t0=largest).rows).all()


def test_the_last_finite_level_can_be_left_in_any_number_of_steps() -> None:
    sde = from_metadata(without_terminal_signal(1000))
    for steps in range(1, 101):
        table = sdedit.plan(sde, t0=0.999, steps=steps)
        assert table.column("sigma")[0] == pytest.approx(3.0)  # ᾱ = 0.1


# --- noise -----------------------------------------------------------------------------------------------------------

PHILOX = {  # Random123, kat_vectors: counter, key, words
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
NORMALS = {  # (seed, step, repeat, stream) -> the bits of the first ten normals
    (0, 0, 0, 0): "3f7dbb2f bf6cb6b3 bf1e1ba1 bef6d1aa be1d534f 3e392a6b 3f54ec98 3e4a2d9a bf97da8a 4022d27b",
    (2**64 - 1, 3, 2, 1): "3eac366a be8f3c51 be575bfe 3e9f1402 3e793d95 bf5abdb4 be9e87fc 3f0a013b be23cf8e c0115d5f",
    (1234567890123456789, 50, 0, 0): "bf3c7bd5 3e0a345b bf4ca45e 3f87b39a bfc48c2c bf479a72 bee43759 be48e39c "
    "bf4bd954 3f7b2534",
}


def hexadecimal(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize("philox", [philox4x32, oracle.philox4x32], ids=["engine", "oracle"])
@pytest.mark.parametrize("known", PHILOX.values(), ids=PHILOX)
def test_philox_gives_the_known_answers(philox: Callable[..., Any], known: tuple[str, str, str]) -> None:
    counter, key, words = map(hexadecimal, known)
    assert philox(counter, key) == words


@pytest.mark.usefixtures("each_noise_maker")
@pytest.mark.parametrize(("use", "bits"), NORMALS.items(), ids=map(str, NORMALS))
def test_normals_have_the_known_bits(use: tuple[int, int, int, int], bits: str) -> None:
    seed, *at = use
    drawn = sdedit.Noise([seed], (1, 2, 5))(*at)
    assert drawn.dtype == np.float32
    assert tuple(drawn.view(np.uint32).ravel().tolist()) == hexadecimal(bits)


@pytest.mark.usefixtures("each_noise_maker")
def test_many_normals_have_the_known_digest() -> None:
    """12288 normals: a change of one rounding shows here, where a handful of them may not notice."""
    drawn = sdedit.Noise([2026], (3, 64, 64))(1, 0, 0)
    digest = "5d9f06f4c17e3c31fcbf14e29c2b94aa11cead3dbdebffdd700853e3df3732ce"
    assert hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest() == digest


@pytest.mark.usefixtures("each_noise_maker")
@pytest.mark.parametrize(
    ("seed", "step", "repeat", "stream", "shape"),
    [
        (0, 0, 0, 0, (3, 5, 7)),
        (2**64 - 1, 1, 2, 1, (1, 3, 3)),
        (2**32 - 1, 1000, 0, 0, (3, 64, 64)),
        (2**32, 2, 1, 0, (1, 129, 131)),
        (0x0123456789ABCDEF, 7, 3, 1, (3, 33, 35)),
    ],
)
def test_normals_are_within_3_ulp_of_float64(
    seed: int, step: int, repeat: int, stream: int, shape: tuple[int, int, int]
) -> None:
    drawn = sdedit.Noise([seed], shape)(step, repeat, stream)[0].astype(np.float64)
    wanted = oracle.normals(seed, shape, step, repeat, stream)
    ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(drawn - wanted) / ulp) <= 3


@pytest.mark.usefixtures("each_noise_maker")
def test_an_image_has_the_same_noise_alone_and_in_any_batch() -> None:
    seeds, shape = [5, 2**64 - 1, 0, 5], (3, 5, 7)
    together, alone = sdedit.Noise(seeds, shape), [sdedit.Noise([seed], shape) for seed in seeds]
    for use in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1)]:
        batch = together(*use).copy()
        for image, single in zip(batch, alone, strict=True):
            assert image.tobytes() == single(*use).tobytes()


@pytest.mark.usefixtures("each_noise_maker")
def test_every_word_of_the_counter_and_the_key_changes_the_noise() -> None:
    uses = [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (2**32, 0, 0, 0)]
    drawn = {sdedit.Noise([seed], (1, 3, 3))(*at).tobytes() for seed, *at in uses}
    assert len(drawn) == len(uses)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_results_do_not_depend_on_the_batch_size(tmp_path: Path, batch: int) -> None:
    model, _ = write_model(tmp_path, "gaussian", "vp-discrete", (3, 5, 7))
    editor = sdedit.load(model, threads=1)
    guides = [pixels((5, 7, 3), number) for number in range(2)]
    options: dict[str, Any] = {"samples": 2, "steps": 5, "sampler": "er-sde", "seed": 2**64 - 3, "repeats": 2}
    alone, together = editor.edit(guides, **options), editor.edit(guides, batch=batch, **options)
    assert together.seeds == [2**64 - 3, 2**64 - 2, 2**64 - 1, 0]
    assert together.x.tobytes() == alone.x.tobytes()


# --- the loop --------------------------------------------------------------------------------------------------------


def tables(sampler: str, eta: float | None) -> Iterator[sdedit.StepTable]:
    for kind, t0 in [("ve", 0.5), ("vp", 0.9), ("vp-discrete", 0.2), ("vp-discrete", 0.7)]:
        yield sdedit.plan(from_metadata(closed_form.SDES[kind]), t0=t0, steps=6, sampler=sampler, eta=eta)


@every_sampler
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_stack_of_step_tables_equals_separate_runs(sampler: str, eta: float | None, masked: bool) -> None:
    def denoiser(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        s2 = (sigma**2).reshape(-1, 1, 1, 1)
        return (x + s2 * np.float32(0.3)) / (1 + s2)

    def run(guide: np.ndarray, table: sdedit.StepTable, seeds: list[int]) -> np.ndarray:
        noise = sdedit.Noise(seeds, guide.shape[1:])
        mask = np.linspace(0, 1, 7, dtype=np.float32)
        composite = {"guide": guide, "mask": mask} if masked else {}
        return sdedit.denoise(denoiser, sdedit.perturb(guide, table, noise), table, noise, **composite)

    rows = list(tables(sampler, eta))
    guides = to_data(pixels((4, 3, 5, 7), 1)).astype(np.float32)
    together = run(guides, sdedit.StepTable.stack(rows), [1, 2, 3, 4])
    separate = [run(guides[j : j + 1], rows[j], [j + 1]) for j in range(4)]
    assert together.tobytes() == np.concatenate(separate).tobytes()


@every_sampler
def test_float64_images_are_denoised_in_float64(sampler: str, eta: float | None) -> None:
    sde, shape = closed_form.SDES["vp-discrete"], (3, 5, 7)

    def denoiser(x: np.ndarray, sigma: Any) -> np.ndarray:
        return np.tanh(x / (1 + np.reshape(sigma, (-1, 1, 1, 1)))).reshape(x.shape)

    def noise(step: int, repeat: int, stream: int) -> np.ndarray:
        return oracle.normals(42, shape, step, repeat, stream)[None]

    guide = to_data(pixels(shape, 2))
    table = sdedit.plan(from_metadata(sde), t0=0.5, steps=8, sampler=sampler, eta=eta)
    got = sdedit.denoise(denoiser, sdedit.perturb(guide[None], table, noise), table, noise)
    wanted = oracle.edit(denoiser, guide, oracle.table(sde, 0.5, 8, sampler, eta), 42)
    np.testing.assert_allclose(got[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ancestral", "er-sde"])
def test_a_denoiser_may_return_the_very_array_it_was_given(sampler: str) -> None:
    table = sdedit.plan(sdedit.VE(0.02, 60.0), t0=0.5, steps=4, sampler=sampler)
    noise, x = sdedit.Noise([0], (1, 3, 3)), np.ones((1, 1, 3, 3), np.float32)
    wanted = sdedit.denoise(lambda x, sigma: x.copy(), x.copy(), table, noise)
    got = sdedit.denoise(lambda x, sigma: x, x.copy(), table, noise)
    np.testing.assert_array_equal(got, wanted)
