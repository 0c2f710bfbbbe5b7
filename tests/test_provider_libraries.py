"""Which of NVIDIA's libraries an ONNX Runtime provider wants, read from its file without loading it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdedit.backends import ort_gpu


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """provider(loads, *names): an ONNX Runtime whose CUDA provider names these libraries, some of which load."""

    def make(loads: set[str], *names: str) -> None:
        folder = tmp_path / "capi"
        folder.mkdir()
        text = b"\0".join([b"\x7fELF", *(name.encode() for name in names), b"libm.so.6", b"end"])
        (folder / "libonnxruntime_providers_cuda.so").write_bytes(text)
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(__file__=str(tmp_path / "i.py")))

        def load(name: str) -> None:
            if name not in loads:
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(ort_gpu.ctypes, "CDLL", load)

    return make


def test_a_library_that_does_not_load_is_named(provider) -> None:
    provider({"libcublas.so.13"}, "libcublas.so.13", "libcudnn.so.9")
    assert ort_gpu.missing_library("ort-cuda") == "libcudnn.so.9: cannot open shared object file"


def test_of_several_versions_of_a_library_one_is_enough(provider) -> None:
    provider({"libnvrtc.so.13", "libcublas.so.13"}, "libnvrtc.so.12", "libcublas.so.13", "libnvrtc.so.13")
    assert ort_gpu.missing_library("ort-cuda") is None


def test_of_several_versions_of_which_none_loads_the_first_is_named(provider) -> None:
    provider(set(), "libnvrtc.so.12", "libnvrtc.so.13")
    assert ort_gpu.missing_library("ort-cuda").startswith("libnvrtc.so.12: ")
