"""Where the steps lie: uniform in time, in log σ, or as Karras et al. space them; and that every way in knows it."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import oracle
import pytest
from closed_form import SDES, gaussian
from PIL import Image, PngImagePlugin

import sdedit
from sdedit import artifact
from sdedit.cli.main import main
from sdedit.sde import from_metadata

SIGMA_MIN = {  # by hand: what the schedule's parameters say, t = 10⁻³ of VP, the first of the trained levels
    "ve": 0.02,
    "edm": 0.002,
    "vp": math.sqrt(math.exp(0.1 * 1e-3 + 19.9 * 1e-6 / 2) - 1),
    "vp-discrete": math.sqrt(1 / (1 - 1e-4) - 1),
}
SAMPLERS = [("em", None), ("ancestral", None), ("ddim", 0.6), ("dpmpp-2m-sde", None), ("er-sde", None)]
every_sde = pytest.mark.parametrize("kind", SDES)
respaced = pytest.mark.parametrize("spacing", ["log-sigma", "karras"])


def levels(kind: str, t0: float, steps: int, spacing: str) -> list[float]:
    """σ of every row, then 0, one level at a time."""
    high, low = oracle.sigma(SDES[kind], t0), SIGMA_MIN[kind]
    parts = [n / (steps - 1) for n in range(steps)]
    if spacing == "log-sigma":
        return [*(high ** (1 - part) * low**part for part in parts), 0.0]
    return [*(((1 - part) * high ** (1 / 7) + part * low ** (1 / 7)) ** 7 for part in parts), 0.0]


@every_sde
def test_the_smallest_level_is_that_of_the_schedule(kind: str) -> None:
    assert from_metadata(SDES[kind]).sigma_min == pytest.approx(SIGMA_MIN[kind], rel=1e-9)


@every_sde
@respaced
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize(("t0", "steps"), [(0.5, 2), (0.3, 7), (1.0, 60)])
def test_plan_has_the_columns_of_the_table_on_every_grid(
    kind: str, spacing: str, sampler: str, eta: float | None, t0: float, steps: int
) -> None:
    table = sdedit.plan(from_metadata(SDES[kind]), t0=t0, steps=steps, sampler=sampler, eta=eta, spacing=spacing)
    wanted, last = [], None
    for s, s_next in pairwise(levels(kind, t0, steps, spacing)):
        vp = kind.startswith("vp")
        a, c, d = (0.0, 0.0, 0.0) if s_next == 0 else oracle.coefficients(sampler, eta, vp, last, s, s_next)
        wanted.append((s, a, 1 - a, c, d, s_next))
        last = s
    for number, name in enumerate(oracle.Row._fields):
        column = np.array(wanted)[:, number]
        np.testing.assert_allclose(table.column(name), column, rtol=1e-7, atol=1e-10, err_msg=name)


@every_sde
def test_uniform_is_the_default_and_its_levels_are_exactly_those_of_the_times(kind: str) -> None:
    sde = from_metadata(SDES[kind])
    table = sdedit.plan(sde, t0=0.7, steps=9)
    assert np.array_equal(table.rows, sdedit.plan(sde, t0=0.7, steps=9, spacing="uniform").rows)
    sigmas = sde.sigma(0.7 * (np.arange(9, -1, -1) / 9))
    assert np.array_equal(table.column("sigma"), sigmas[:-1])
    assert np.array_equal(table.column("sigma_next"), sigmas[1:])


@every_sde
@respaced
def test_every_grid_starts_at_t0_itself_and_ends_at_the_smallest_level_itself(kind: str, spacing: str) -> None:
    sde = from_metadata(SDES[kind])
    sigmas = sdedit.plan(sde, t0=0.4, steps=11, spacing=spacing).column("sigma")
    assert (sigmas[0], sigmas[-1]) == (sdedit.plan(sde, t0=0.4, steps=11).column("sigma")[0], sde.sigma_min)


@every_sde
@respaced
def test_a_single_step_is_the_same_on_every_grid(kind: str, spacing: str) -> None:
    sde = from_metadata(SDES[kind])
    assert np.array_equal(sdedit.plan(sde, steps=1, spacing=spacing).rows, sdedit.plan(sde, steps=1).rows)


@respaced
def test_a_start_below_the_smallest_level_is_refused(spacing: str) -> None:
    sde = from_metadata(SDES["vp-discrete"])
    with pytest.raises(sdedit.OptionError, match=r"5 steps from t0 0\.0005 are too close together") as refused:
        sdedit.plan(sde, t0=0.0005, steps=5, spacing=spacing)
    assert refused.value.hint == "use fewer steps or a larger t0"


@respaced
def test_a_schedule_without_room_for_the_grid_is_refused(spacing: str) -> None:
    with pytest.raises(sdedit.OptionError, match="too close together"):
        sdedit.plan(sdedit.VP(0.0, 1e-320), t0=1.0, steps=5, spacing=spacing)


@pytest.mark.parametrize("spacing", ["", "log", None, 3, ["karras"]])
def test_an_unknown_spacing_is_refused(spacing: Any) -> None:
    with pytest.raises(sdedit.OptionError, match="unknown spacing") as refused:
        sdedit.plan(sdedit.VE(0.02, 60.0), spacing=spacing)
    assert refused.value.hint == "choose one of uniform, log-sigma, karras"


# --- every way in ----------------------------------------------------------------------------------------------------


def model(path: Path, **defaults: Any) -> Path:
    mean = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 8, 12))
    return gaussian(path, SDES["vp"], mean, std=0.5, **({"defaults": defaults} if defaults else {}))[0]


GUIDE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


def edit(editor: sdedit.Editor, **options: Any) -> sdedit.EditResult:
    return editor.edit(GUIDE, steps=5, sampler="ddim", **options)


def test_an_edit_follows_its_grid(tmp_path: Path) -> None:
    editor = sdedit.load(model(tmp_path / "model.onnx"), backend="ort-cpu", threads=1)
    made = edit(editor, spacing="karras")
    assert made.options.spacing == "karras"
    table = sdedit.plan(editor.sde, steps=5, sampler="ddim", spacing="karras")
    x = sdedit.perturb(GUIDE[None].transpose(0, 3, 1, 2) / 127.5 - 1, table, sdedit.Noise([0], (3, 8, 12), steps=5))
    mean = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 8, 12))
    for sigma, a, b, *_ in table.rows:
        x = a * x + b * (0.25 * x + sigma**2 * mean) / (0.25 + sigma**2)
    np.testing.assert_allclose(made.x, x, atol=1e-5)
    assert not np.array_equal(made.x, edit(editor).x)


def test_the_models_default_is_taken_unless_another_is_given(tmp_path: Path) -> None:
    editor = sdedit.load(model(tmp_path / "model.onnx", spacing="karras"), backend="ort-cpu", threads=1)
    assert edit(editor).options.spacing == "karras"
    assert edit(editor, spacing="uniform").options.spacing == "uniform"


def test_the_models_spacing_is_for_the_models_sampler(tmp_path: Path) -> None:
    editor = sdedit.load(model(tmp_path / "model.onnx", sampler="er-sde", spacing="karras"), backend="ort-cpu")
    for sampler, spacing in ((None, "karras"), ("er-sde", "karras"), ("em", "uniform")):
        assert editor.edit(GUIDE, steps=2, sampler=sampler).options.spacing == spacing
    assert editor.edit(GUIDE, steps=2, sampler="em", spacing="log-sigma").options.spacing == "log-sigma"


def test_a_model_that_recommends_an_unknown_spacing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sdedit.ArtifactError, match=r"defaults.spacing is 'cosine'; wanted one of uniform, log-sigma"):
        artifact.read(model(tmp_path / "model.onnx", spacing="cosine"))


def test_inspect_prints_the_table_of_the_spacing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model(tmp_path / "model.onnx")
    assert main(["inspect", str(path), "--steps", "4", "--spacing", "log-sigma", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert table["spacing"] == "log-sigma"
    assert table["rows"] == sdedit.plan(from_metadata(SDES["vp"]), steps=4, spacing="log-sigma").rows.tolist()


def test_an_exported_edit_steps_where_the_command_does(tmp_path: Path) -> None:
    path, target = model(tmp_path / "model.onnx"), tmp_path / "edit.onnx"
    assert main(["export", "--loop", str(path), "-o", str(target), "--steps", "4", "--spacing", "karras"]) == 0
    assert artifact.loop_metadata(target)["spacing"] == "karras"
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (image,) = session.run(["image"], {"guide": GUIDE[None], "seed": np.array([3], np.uint64)})
    editor = sdedit.load(path, backend="ort-cpu", threads=1)
    assert np.array_equal(image[0], editor.edit(GUIDE, steps=4, spacing="karras", seed=3).results[0].pixels)


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[str], Path]:
    """The words that name guide and model, and a picture edited with --spacing karras."""
    guide, out = tmp_path / "guide.png", tmp_path / "out.png"
    Image.fromarray(GUIDE).save(guide)
    words = [str(guide), "-m", str(model(tmp_path / "model.onnx"))]
    rest = ["--steps", "4", "--spacing", "karras", "--backend", "ort-cpu"]
    assert main(["edit", *words, "-o", str(out), *rest]) == 0
    return words, out


def test_a_record_names_the_spacing_and_a_replay_follows_it(made: tuple[list[str], Path], tmp_path: Path) -> None:
    words, out = made
    assert json.loads(Image.open(out).info["sdedit"])["options"]["spacing"] == "karras"
    again = tmp_path / "again.png"
    assert main(["edit", "--replay", str(out), *words, "-o", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_record_from_before_there_were_spacings_replays_uniformly(
    made: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, out = made
    older, again, uniform = (tmp_path / f"{name}.png" for name in ("older", "again", "uniform"))
    record = json.loads(Image.open(out).info["sdedit"])
    del record["options"]["spacing"]
    text = PngImagePlugin.PngInfo()
    text.add_text("sdedit", json.dumps(record))
    Image.open(out).save(older, pnginfo=text)
    assert main(["edit", "--replay", str(older), *words, "-o", str(again)]) == 0
    assert main(["edit", *words, "-o", str(uniform), "--steps", "4", "--backend", "ort-cpu"]) == 0
    assert again.read_bytes() == uniform.read_bytes()


def test_a_replay_takes_no_spacing(
    made: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = made
    command = ["edit", "--replay", str(out), *words, "-o", str(tmp_path / "again.png"), "--spacing", "uniform"]
    assert main(command) == 2
    assert "--replay takes its options from the record, not from --spacing" in capsys.readouterr().err


def test_an_unknown_spacing_is_a_wrong_use_of_the_command(
    made: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = made
    assert main(["edit", *words, "-o", str(tmp_path / "no.png"), "--spacing", "cosine"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == ["error: unknown spacing 'cosine'", "hint: choose one of uniform, log-sigma, karras"]
