"""Verification finds a function that differs, where it differs, and passes one that does not."""

import json

import numpy as np
import pytest
from closed_form import SDES, gaussian, identity

from sdedit import backends, verify
from sdedit.cli.main import main
from sdedit.sde import from_metadata

SDE = from_metadata(SDES["vp"])
GUIDES = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)


def denoiser(x, sigma):
    s2 = sigma[:, None, None, None] ** 2
    return (x / (1 + s2)).astype(np.float32)


def compared(candidate, **options):
    return verify.compare(lambda batch: denoiser, lambda batch: candidate, SDE, GUIDES, **{"tolerance": 1e-5} | options)


def test_the_same_function_has_no_error():
    report = compared(denoiser, with_images=True)
    assert report.within
    assert {e.error for e in report.evaluations} == {0.0}
    assert report.images == verify.ImageDistance(50, 0.0, 0.0)


def test_it_looks_at_the_whole_schedule_and_along_an_edit():
    report = compared(denoiser)
    times = [e.t for e in report.evaluations if e.where == "schedule"]
    np.testing.assert_allclose(times, verify.TIMES, rtol=1e-6)
    edit = [e.sigma for e in report.evaluations if e.where == "edit"]
    assert max(edit) == pytest.approx(float(SDE.sigma(verify.EDIT_T0)))
    assert len(set(edit)) == 8


@pytest.mark.parametrize("level", [0.001, 0.15, 1.0])
def test_an_error_at_one_noise_level_is_found_there(level):
    sigma_wrong = float(SDE.sigma(level))

    def wrong(x, sigma):
        off = np.isclose(sigma, sigma_wrong, rtol=1e-3)[:, None, None, None]
        return denoiser(x, sigma) + np.float32(0.1) * off * x

    report = compared(wrong)
    assert not report.within
    assert report.worst.t == pytest.approx(level, rel=1e-2)


def test_a_choice_made_by_the_first_image_of_a_batch_is_found():
    """As of expert networks for high and low noise, which a tracer freezes as it finds them."""

    def chosen(x, sigma):
        return denoiser(x, sigma) * np.float32(2 if sigma[0] > SDE.sigma(0.7) else 1)

    report = verify.compare(lambda batch: chosen, lambda batch: denoiser, SDE, GUIDES, tolerance=1e-5)
    wrong = {e.t > 0.7 for e in report.evaluations if e.where == "schedule" and e.error > 1e-5}
    assert wrong == {True}


def test_an_error_in_the_second_image_of_a_batch_is_found():
    def wrong(x, sigma):
        return denoiser(x, sigma) + np.float32(0.01) * (np.arange(len(x)) == 1)[:, None, None, None]

    assert not compared(wrong).within


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_candidate_that_is_not_finite_is_never_within(value):
    report = compared(lambda x, sigma: np.full_like(x, value), tolerance=np.inf if value is np.nan else 1.0)
    assert not report.within


def test_the_error_is_relative_to_the_larger_of_the_clean_image_and_the_noise():
    x, wanted, found = np.array([100.0, 0.0]), np.array([0.0, 1.0]), np.array([0.0, 1.1])
    assert verify.relative_error(x, wanted, found) == pytest.approx(0.1 / np.sqrt(100**2 + 1))
    assert verify.relative_error(wanted, wanted, found) == pytest.approx(0.1)


def test_progress_counts_every_network_call():
    calls = []
    compared(denoiser, with_images=True, on_evaluation=lambda done, total: calls.append((done, total)))
    assert calls == [(n + 1, 116) for n in range(116)]


def test_picture_distance_is_in_eight_bit_levels():
    def brighter(x, sigma):
        return denoiser(x, sigma) * 0 + np.float32(6.5 / 255)

    def dark(x, sigma):
        return denoiser(x, sigma) * 0 + np.float32(0.5 / 255)

    images = verify.compare(
        lambda batch: dark, lambda batch: brighter, SDE, GUIDES, tolerance=1, with_images=True
    ).images
    assert images.mean == pytest.approx(3, abs=0.01)
    assert images.percentile_99_9 == 3


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models that differ by a thousandth."""
    folder = tmp_path_factory.mktemp("pair")
    mean = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 8, 8))
    right, _ = gaussian(folder / "right.onnx", SDES["vp"], mean, 0.5)
    wrong, _ = gaussian(folder / "wrong.onnx", SDES["vp"], mean, 0.5 * 1.001)
    return str(right), str(wrong)


def test_two_artifacts_that_agree_exit_0(pair, capsys):
    assert main(["verify", pair[0], "--against", pair[0]]) == 0
    assert "worst 0.00e+00" in capsys.readouterr().out


def test_two_artifacts_that_differ_exit_3_with_the_table(pair, capsys):
    assert main(["verify", pair[1], "--against", pair[0]]) == 3
    out = capsys.readouterr().out
    assert "tolerance 1e-05: FAILED" in out
    assert out.count("schedule") == 8
    assert main(["verify", pair[1], "--against", pair[0], "--tolerance", "0.1"]) == 0


def test_json_holds_both_sides_and_every_evaluation(pair, capsys):
    assert main(["verify", pair[1], "--against", pair[0], "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["within"] is False
    assert found["against"]["backend"] == "ort-cpu"
    assert max(e["error"] for e in found["evaluations"]) == found["worst"]["error"]


def test_one_artifact_is_verified_against_another_backend(pair, capsys):
    assert main(["verify", pair[0], "--against", "ort-cpu"]) == 0
    assert main(["verify", pair[0], "--against", "ort-cuda"]) == 1
    assert "error: ort-cuda" in capsys.readouterr().err


def test_models_that_are_not_meant_to_agree_are_refused(pair, tmp_path, capsys):
    other = identity(tmp_path / "other.onnx", SDES["ve"], (3, 8, 8))
    assert main(["verify", pair[0], "--against", str(other)]) == 2
    assert "different noise schedules" in capsys.readouterr().err
    larger = identity(tmp_path / "larger.onnx", SDES["vp"], (3, 16, 8))
    assert main(["verify", pair[0], "--against", str(larger)]) == 2
    assert "height is 8 in closed-form and 16 in closed-form" in capsys.readouterr().err


def test_the_bundled_guides_are_the_examples():
    for guide in verify.GUIDES:
        example = guide.parents[2] / "examples" / guide.name
        if example.exists():  # not in an installed package
            assert example.read_bytes() == guide.read_bytes()


def test_the_candidate_is_asked_for_batches_of_one_and_three():
    asked = []

    def bind(batch):
        asked.append(batch)
        return denoiser

    verify.compare(lambda batch: denoiser, bind, SDE, GUIDES, tolerance=1e-5)
    assert set(asked) == {1, 3}


def test_every_precision_that_can_be_asked_for_has_a_tolerance():
    assert tuple(verify.TOLERANCES) == backends.PRECISIONS
