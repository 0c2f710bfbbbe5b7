"""What the programs of benchmarks/ have in common: they refuse what they cannot measure."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("images", [505, 5, 0])
def test_a_folder_that_has_no_whole_tenths_is_refused(images):
    pytest.importorskip("onnxruntime")
    command = [sys.executable, BENCHMARKS / "batch.py", "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, f"--images is {images}; wanted a positive multiple of 10" in done.stderr) == (2, True)
