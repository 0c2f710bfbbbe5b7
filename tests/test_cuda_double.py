"""The driver double, in a process of its own: this one must go on without a GPU, for all the libraries that look."""

import os
import shutil
import subprocess
from pathlib import Path

import cuda_double
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_the_double_behaves_like_a_driver() -> None:
    pytest.importorskip("cuda.bindings")
    cuda_double.isolated(cuda_double.FOLDER / "check_double.py")


def test_the_double_has_the_interface_of_the_real_header() -> None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (toolkit / "include" / "cuda.h").is_file():
        pytest.skip("needs cuda.h: set CUDA_HOME")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DDOUBLE_CHECKS_ABI", f"-I{toolkit / 'include'}"]
    run = subprocess.run([*command, str(cuda_double.FOLDER / "libcuda_double.cpp")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
