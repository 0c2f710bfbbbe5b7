"""The device loop without a GPU: its cases run on the driver double, in a process of its own for each port."""

import atexit
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_double import FOLDER, isolated

import sdedit

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
PORTS = {"cuda-core": "cuda.bindings", "pycuda": "pycuda"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the double is compiled once."""
    return tmp_path_factory.mktemp("double")


@pytest.mark.parametrize("cases", ["device_loop", "tensorrt_backend", "ort_gpu", "closing", "bench"])
@pytest.mark.parametrize("port", PORTS)
def test_it_runs_on_the_driver_double(port, cases, folder: Path, monkeypatch: pytest.MonkeyPatch):
    package = PORTS[port].partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("SDEDIT_CUDA", port)
    monkeypatch.setenv("SDEDIT_DOUBLE_FOLDER", str(folder))
    isolated(FOLDER / f"{cases}_cases.py")


def test_pycudas_port_frees_nothing_more_once_the_interpreter_ends() -> None:
    from sdedit.cuda.pycuda_port import PycudaPort

    calls: list[str] = []
    context = SimpleNamespace(detach=lambda: calls.append("detach"), push=lambda: calls.append("push"))
    device = SimpleNamespace(
        name=lambda: "none", compute_capability=lambda: (9, 0), retain_primary_context=lambda: context
    )
    cu = SimpleNamespace(get_driver_version=lambda: 13000, Error=RuntimeError)
    port = PycudaPort(cu, device, "0")
    atexit.unregister(port._detach)
    port._detach()
    with pytest.raises(sdedit.SdeditError, match="the interpreter is ending"), port.current():
        pass
    assert calls == ["detach"]
