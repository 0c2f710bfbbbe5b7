"""Wrong input to the commands of later days: told as test_bad_input.py demands it, and nothing changed on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closed_form import SDES, gaussian
from PIL import Image
from test_bad_input import Ran, arguments, complaints, files

from sdedit.cli.main import main

SHAPE = (3, 16, 16)
Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with model.onnx, guide.png and mask.png, in which commands run."""
    monkeypatch.delenv("SDEDIT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    gaussian(Path("model.onnx"), SDES["vp"], np.zeros(SHAPE), 0.5)
    picture(Path("guide.png"))
    Image.fromarray(np.pad(np.full((6, 6), 255, np.uint8), 5)).save("mask.png")


def picture(path: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    with open(path, "wb") as file:  # by a file, since Pillow does not take every name
        Image.fromarray(pixels).save(file, "PNG")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*given: Any) -> Ran:
        capfd.readouterr()
        try:
            code = main(arguments(*given))
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Run a command that must be refused: its words, the code, and a part of the error line."""

    def refused(words: str, code: int, text: str) -> None:
        before = files(tmp_path)
        ran = run(*words.split())
        assert complaints(ran) == []
        assert (ran.code, ran.out) == (code, ""), ran.err
        assert text in ran.err.splitlines()[-2]
        assert files(tmp_path) == before

    return refused


EDIT = "edit guide.png -m model.onnx --threads 1 --steps 2 -o out.png"


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        ("model.onnx", "model.onnx: not a picture, or of an unknown format"),
        (".", ".: is a folder, not a picture"),
    ],
)
def test_a_guide_that_is_none_is_told_the_same_way_with_a_budget(
    refused: Callable[..., None], guide: str, text: str
) -> None:
    refused(EDIT.replace("guide.png", guide) + " --mask mask.png --max-ms 1e6", 1, text)
