"""The studies of quality: results are kept, resumable and those of the engine; a report says how complete it is."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from closed_form import SDES, gaussian

import sdedit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import few_steps
import gram
import samples
from measured import Features
from samples import CHUNK, Cache, Guides, Setting, results

QUICK = Setting(0.5, 2, "ancestral")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return gaussian(path, SDES["vp"], np.full((3, 64, 64), 0.25), std=0.5)[0]


@pytest.fixture(scope="module")
def guides() -> Guides:
    photos = np.random.default_rng(0).integers(0, 256, (3 * CHUNK, 8, 8, 3), np.uint8)
    return Guides(photos.repeat(8, axis=1).repeat(8, axis=2), 2 * CHUNK)


@pytest.fixture(scope="module")
def made(model: Path, guides: Guides, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, np.ndarray]:
    cache = Cache(tmp_path_factory.mktemp("cache"), model)
    return cache, results(cache, QUICK, guides)


def test_a_settings_results_are_the_engines_with_a_seed_for_each_guide(
    made: tuple[Cache, np.ndarray], model: Path, guides: Guides
) -> None:
    painted = list(samples.paint(guides.photos, 6))
    wanted = sdedit.load(model, backend="ort-cpu", threads=1).edit(painted, t0=0.5, steps=2, batch=CHUNK)
    assert np.array_equal(made[1], np.stack([one.pixels for one in wanted.results]))


def test_only_missing_chunks_are_made_again(made: tuple[Cache, np.ndarray], guides: Guides) -> None:
    cache, before = made
    first, second = (cache.chunk(QUICK, c) for c in range(2))
    marked = np.full_like(np.load(first), 7)
    np.save(first, marked)
    second.unlink()
    assert cache.missing(QUICK, guides) == [1]
    again = results(cache, QUICK, guides)
    assert np.array_equal(again, np.concatenate([marked, before[CHUNK:]]))
    np.save(first, before[:CHUNK])


def test_a_network_call_of_several_chunks_changes_nothing_but_rounding(
    made: tuple[Cache, np.ndarray], guides: Guides, tmp_path: Path
) -> None:
    together = results(replace(made[0], folder=tmp_path, batch=2 * CHUNK), QUICK, guides)
    assert np.abs(together.astype(int) - made[1]).max() <= 1


def test_a_batch_that_holds_no_whole_chunks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sdedit.OptionError, match="batch is 30; wanted a multiple of 20"):
        Cache(tmp_path, batch=30)


def test_after_its_end_a_study_has_what_was_whole(made: tuple[Cache, np.ndarray], guides: Guides) -> None:
    other = replace(QUICK, steps=3)
    assert list(samples.made(made[0], [QUICK, other], guides, until=0.0)) == []
    assert list(samples.made(made[0], [QUICK], guides)) == [QUICK]
    assert len(made[0].missing(other, guides)) == 2


def test_a_cache_of_another_backend_is_refused(made: tuple[Cache, np.ndarray], guides: Guides) -> None:
    path = made[0].folder / samples.MADE_BY
    before = path.read_text()
    path.write_text(before.replace("ort-cpu", "ort-cuda"))
    with pytest.raises(sdedit.OptionError, match="were made with backend ort-cuda, not ort-cpu"):
        results(made[0], QUICK, guides)
    path.write_text(before)


def test_features_are_kept_by_content(made: tuple[Cache, np.ndarray], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    mean = torch.jit.script(torch.nn.Flatten())
    torch.jit.save(mean, tmp_path / "network.pt")
    features = Features(replace(made[0], folder=tmp_path), tmp_path / "network.pt", 1)
    assert not features.has(made[1])
    rows = features(made[1])
    assert rows.shape == (2 * CHUNK, 3 * 299**2)
    assert features.has(made[1][CHUNK:])
    assert np.array_equal(features(made[1][CHUNK:]), rows[CHUNK:])


def test_kid_from_kernel_matrices_is_kid() -> None:
    rng = np.random.default_rng(0)
    real, one, other = (rng.normal(size=(n, 8)) for n in (70, 50, 50))
    size = {"subset_size": 20, "subsets": 12, "seed": 3}
    grams = [gram.Beside(real)(a) for a in (one, other)]
    for ours, wanted in (
        (gram.kid(grams[0], **size), sdedit.kid(one, real, **size)),
        (gram.kid_difference(*grams, **size), sdedit.kid_difference(one, other, real, **size)),
    ):
        assert (ours.value, ours.standard_error) == pytest.approx((wanted.value, wanted.standard_error), rel=1e-9)


def test_more_guides_begin_with_the_same(guides: Guides) -> None:
    assert np.array_equal(replace(guides, count=CHUNK).photos, guides.photos[:CHUNK])


def test_a_cache_of_another_model_is_refused(made: tuple[Cache, np.ndarray], guides: Guides, tmp_path: Path) -> None:
    other, _ = gaussian(tmp_path / "other.onnx", SDES["ve"], np.zeros((3, 64, 64)), std=0.5)
    with pytest.raises(sdedit.OptionError, match="were made with model") as refused:
        results(replace(made[0], model=other), QUICK, guides)
    assert refused.value.hint == "name another --cache folder"


def test_another_run_has_other_seeds_and_another_folder() -> None:
    other = replace(QUICK, run="b")
    assert (QUICK.seed(7), other.seed(7)) == (7, 2**32 + 7)
    assert QUICK.name != other.name


def test_every_setting_of_the_study_has_a_folder_of_its_own() -> None:
    study = few_steps.settings()
    assert len({one.name for one in study}) == len(study) == len(few_steps.STEPS) * 15 + 2
    assert (study[0], study[26]) == (few_steps.REFERENCE, few_steps.AGAIN)
    assert {one.steps for one in study[1:26]} == {20, 25}  # those of most interest first


def test_the_same_results_are_no_worse_than_em_and_others_are() -> None:
    rng = np.random.default_rng(0)
    real, reference = rng.normal(size=(400, 8)), rng.normal(size=(200, 8)) + 0.1
    distances = np.ones(200)
    measure = few_steps.Measures(reference, real)
    same, worse = measure(reference, distances), measure(reference + 1, distances)
    assert same["kid_minus_em500"]["value"] == same["to_em500_minus_em500"]["value"] == 0
    for name in ("kid_minus_em500", "to_em500_minus_em500"):
        assert worse[name]["value"] > 5 * worse[name]["standard_error"]


def test_the_plot_is_drawn_from_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from few_steps_plot import draw, title

    figure = {"value": 0.01, "standard_error": 0.001}
    some = [few_steps.REFERENCE, *few_steps.settings()[1:4]]
    rows = [asdict(one) | {name: figure for name in ("kid", "to_em500", "l2")} for one in some]
    conditions = {"model": {"name": "eurosat-64"}, "guides": 1000}
    study = json.loads(json.dumps({"conditions": conditions, "done": 4, "of": 107, "settings": rows}))
    draw(study, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert title(study) == "eurosat-64, t0 0.5, 1000 stroke guides; 4 of 107 settings; bars: ± standard error"


def test_shown_are_those_whose_results_are_most_like_em500s() -> None:
    pytest.importorskip("matplotlib")
    from few_steps_plot import closest

    rows = [
        {"steps": steps, "sampler": sampler, "to_em500": {"value": distance}}
        for steps, sampler, distance in ((10, "em", 0.3), (10, "ddim", -0.001), (20, "ddim", 0.2), (20, "er-sde", 0.1))
    ]
    assert [(row["steps"], row["sampler"]) for row in closest(rows, (5, 10, 20))] == [(10, "ddim"), (20, "er-sde")]


def test_a_number_of_guides_that_fills_no_chunk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdedit.export import eurosat

    monkeypatch.setattr(eurosat, "load", lambda archive, held_out: (np.zeros((50, 64, 64, 3), np.uint8), []))
    with pytest.raises(sdedit.OptionError, match="guides is 30; wanted a multiple of 20 up to 50"):
        samples.Guides.load(Path("photos.zip"), 30)
