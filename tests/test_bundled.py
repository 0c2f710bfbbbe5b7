"""The bundled model is an artifact like any other, small, and really denoises."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit import artifact, image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def editor() -> sdedit.Editor:
    return sdedit.load()


def test_it_is_a_small_64x64_rgb_artifact_with_its_licence_and_card() -> None:
    bundled = artifact.read(artifact.BUNDLED)
    assert (bundled.channels, bundled.height, bundled.width, bundled.precision) == (3, 64, 64, "fp32")
    assert bundled.size_bytes <= 12_000_000
    assert bundled.metadata["license"] == "MIT"
    assert (artifact.BUNDLED.parent / "LICENSE-EuroSAT").read_text().startswith("MIT License")
    assert str(bundled.metadata["source"]["training_images"]) in (
        artifact.BUNDLED.with_suffix(".md").read_text().replace(",", "")
    )


@pytest.mark.parametrize(("sigma", "left"), [(0.1, 0.6), (0.3, 0.35), (1.0, 0.2)])
def test_it_removes_most_of_the_noise_from_a_photograph(editor: sdedit.Editor, sigma: float, left: float) -> None:
    photograph = image.read(EXAMPLES / "photo.png", 3)
    clean = image.to_model(photograph, image.place(photograph, (64, 64), "exact"))[None]
    noisy = clean + sigma * sdedit.Noise([3], clean.shape[1:])(0, 0, 0)
    denoised = editor.backend.bind(1, {})(noisy, np.full(1, sigma, np.float32))
    assert np.sqrt(np.mean((denoised - clean) ** 2)) < left * sigma


def test_the_result_follows_the_colours_of_the_strokes(editor: sdedit.Editor) -> None:
    guide = Image.open(EXAMPLES / "strokes.png").convert("RGB").resize((64, 64), Image.Resampling.BOX)
    coarse_guide = np.asarray(guide.resize((4, 4), Image.Resampling.BOX), np.float64)
    for t0, distance in ((0.3, 8), (0.5, 12)):
        (edited,) = editor.edit(EXAMPLES / "strokes.png", t0=t0).images
        coarse = np.asarray(edited.resize((4, 4), Image.Resampling.BOX), np.float64)
        assert np.abs(coarse - coarse_guide).mean() < distance
        texture, flat = (np.asarray(p, np.float64)[6:24, 2:22].std(axis=(0, 1)).mean() for p in (edited, guide))
        assert texture > 2 * flat  # the upper left stroke has become a wood


def test_a_smaller_t0_stays_closer_to_the_guide(editor: sdedit.Editor) -> None:
    guide = np.asarray(Image.open(EXAMPLES / "photo.png").convert("RGB"), np.float64)
    distances = []
    for t0 in (0.1, 0.3, 0.5, 0.7):
        images = editor.edit(EXAMPLES / "photo.png", t0=t0, samples=3).images
        distances.append(np.mean([np.abs(np.asarray(image, np.float64) - guide).mean() for image in images]))
    assert distances == sorted(distances)
