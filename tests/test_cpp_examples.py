"""The programs in examples/cpp: built by CMake, run, and their pictures compared with Python's.

ONNX Runtime's library is the one of the wheel, its headers those that CMake finds (or ONNXRUNTIME_INCLUDE_DIR).
edit_trt is built around a stand-in for TensorRT and runs on the driver double: argument packing, order and memory
are shown, a GPU is not.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cuda_double
import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit import artifact
from sdedit.cli.main import main
from sdedit.cuda import kernels
from sdedit.executor import Batch, HostExecutor
from sdedit.image import to_pixels
from sdedit.operators import graph, shipped

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "examples" / "cpp"
STAND_IN = ROOT / "tests" / "edit_trt"
SLOPE, OFFSET = np.float32(0.9), np.float32(0.05)
MASK64 = 2**64 - 1

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("cmake", "g++")), reason="needs cmake and g++"
)
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Built:
    folder: Path
    said: str  # by CMake

    def program(self, name: str) -> Path:
        """The path of a program. Skips by the name of what it lacks."""
        if found := re.search(rf"{name} is not built: (\S+) was not found", self.said):
            pytest.skip(f"{name} needs {found[1]}: see {SOURCES.relative_to(ROOT)}/README.md")
        return self.folder / name


def onnxruntime_library() -> Path:
    """The shared library in the wheel."""
    import onnxruntime

    return next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.*"))


def cuda_include() -> Path:
    """NVIDIA's cuda.h, or the part of it that the driver double knows."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    return toolkit if (toolkit / "cuda.h").is_file() else STAND_IN / "cuda"


def configure(folder: Path, *options: str) -> str:
    """What CMake says."""
    done = subprocess.run(["cmake", "-S", SOURCES, "-B", folder, *options], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver double with the product's kernels, libcuda.so.1."""
    return cuda_double.build(tmp_path_factory.mktemp("double"), [cuda_double.FOLDER / "device_loop.cpp"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, double: Path) -> Built:
    folder = tmp_path_factory.mktemp("build")
    tensorrt = folder / "libnvinfer.so"
    compile_it = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{cuda_include()}", STAND_IN / "nvinfer.cpp"]
    subprocess.run([*compile_it, "-o", tensorrt, double], check=True)
    headers = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    options = {
        "CMAKE_BUILD_TYPE": "Debug",  # the bits do not depend on it
        "CMAKE_CXX_FLAGS": "-Wall -Wextra -Werror -pedantic",
        "CMAKE_CXX_FLAGS_DEBUG": "-O1",
        "ONNXRUNTIME_LIBRARY": onnxruntime_library(),
        "TENSORRT_INCLUDE_DIR": STAND_IN,
        "TENSORRT_LIBRARY": tensorrt,
        "CUDA_INCLUDE_DIR": cuda_include(),
        "CUDA_LIBRARY": double,
        **({"ONNXRUNTIME_INCLUDE_DIR": headers} if headers else {}),
    }
    said = configure(folder, *(f"-D{name}={value}" for name, value in options.items()))
    done = subprocess.run(["cmake", "--build", folder, "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return Built(folder, said)


@pytest.fixture
def run(built: Built, tmp_path: Path) -> Run:
    """run("step_cpp", …) -> the finished process, in a folder of its own."""

    def go(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([built.program(name), *arguments], cwd=tmp_path, capture_output=True, text=True)

    return go


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    """A guide of the small models' size."""
    pixels = np.random.default_rng(3).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "guide.png")
    return tmp_path / "guide.png"


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """table(model, "--steps", "4", …) -> the file that `sdedit inspect --json` printed."""

    def write(model: Path, *options: str) -> Path:
        assert main(["inspect", "--json", *options, str(model)]) == 0
        (tmp_path / "table.json").write_text(capsys.readouterr().out)
        return tmp_path / "table.json"

    return write


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def edited_by_command(*arguments: str | Path) -> np.ndarray:
    assert main(["edit", *map(str, arguments), "-o", "python.png", "--backend", "ort-cpu", "--threads", "1"]) == 0
    return pixels_of(Path("python.png"))


# --- step_cpp: the loop in C++ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ancestral", "em", "er-sde"])
def test_the_loop_in_cpp_makes_the_picture_that_python_makes(sampler, run, network, guide, table, monkeypatch):
    """Equal, not close: one library runs the network, and the rest is bit-identical by construction."""
    monkeypatch.chdir(guide.parent)
    rows = table(network, "--t0", "0.5", "--steps", "6", "--sampler", sampler)
    said = succeed(run("step_cpp", network, rows, guide, "cpp.png", "--seed", str(MASK64), "--threads", "1"))
    assert re.fullmatch(r"edited in [\d.e+-]+ ms, 6 steps\n", said)
    options = ("--t0", "0.5", "--steps", "6", "--sampler", sampler, "--seed", str(MASK64))
    assert np.array_equal(pixels_of(Path("cpp.png")), edited_by_command(guide, "-m", network, *options))


@pytest.mark.parametrize("operators", ["on", "off"])
def test_the_bundled_model_in_cpp_makes_the_picture_that_python_makes(operators, run, tmp_path, table, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDEDIT_OPERATORS", operators)
    Image.open(ROOT / "examples" / "strokes.png").convert("RGB").resize((64, 64)).save("small.png")
    model, options = artifact.BUNDLED, []
    if operators == "on":
        if shipped.usable_library() is None:
            pytest.skip("the operators are for Linux on x86-64 with AVX2")
        graph.write(model, Path("graph"))
        model, options = Path("graph/graph.onnx"), ["--operators", "graph/liboperators.so"]
    rows = table(artifact.BUNDLED, "--t0", "0.5", "--steps", "20")
    succeed(run("step_cpp", model, rows, "small.png", "cpp.png", "--seed", "7", "--threads", "1", *options))
    wanted = edited_by_command("small.png", "--t0", "0.5", "--steps", "20", "--seed", "7")
    assert np.array_equal(pixels_of(Path("cpp.png")), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": "nowhere.json"}, "nowhere.json: cannot be opened"),
        ({"table": "guide.png"}, "guide.png: is not JSON (make it with: sdedit inspect"),
        ({"model": "nowhere.onnx"}, "nowhere.onnx"),
        ({"guide": "nowhere.png"}, "nowhere.png: No such file or directory"),
        ({"guide": "large.png"}, "large.png: is 20x10; the model wants 12x8"),
        ({"out": "nowhere/out.png"}, "nowhere/out.png: No such file or directory"),
    ],
)
def test_a_failure_of_the_loop_is_one_line(change, said, run, network, guide, table, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    names = {"model": network, "table": table(network, "--steps", "1"), "guide": guide, "out": "out.png", **change}
    done = run("step_cpp", *names.values())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "wanted 4 file names"),
        (["a", "b", "c", "d", "--seed"], "--seed wants a value"),
        (["a", "b", "c", "d", "--seed", "-1"], "--seed is -1; wanted a whole number from 0 to 18446744073709551615"),
        (["a", "b", "c", "d", "--seed", str(2**64)], f"--seed is {2**64}; wanted a whole number"),
        (["a", "b", "c", "d", "--steps", "5"], "unknown option --steps"),
    ],
)
def test_a_wrong_command_line_is_answered_with_the_right_one(arguments, said, run):
    done = run("step_cpp", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "usage: " in done.stderr


# --- edit_cpp: the whole edit as one file ------------------------------------------------------------------------


def exported(model: Path, target: Path, *options: str) -> Path:
    """`sdedit export --loop`."""
    assert main(["export", str(model), "--loop", "-o", str(target), *options]) == 0
    return target


def test_one_file_in_cpp_makes_the_picture_that_python_makes(run, network, guide, monkeypatch):
    """Within one level: the graph's normals are the same bits, but ONNX Runtime may fuse its arithmetic."""
    monkeypatch.chdir(guide.parent)
    edit = exported(network, guide.parent / "edit.onnx", "--t0", "0.5", "--steps", "6")
    assert "edited in" in succeed(run("edit_cpp", edit, guide, "cpp.png", "--seed", str(MASK64), "--threads", "1"))
    wanted = edited_by_command(guide, "-m", network, "--t0", "0.5", "--steps", "6", "--seed", str(MASK64))
    difference = np.abs(pixels_of(Path("cpp.png")).astype(int) - wanted)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 2


def test_an_edit_with_a_mask_keeps_what_is_black(run, network, guide, tmp_path):
    edit = exported(network, tmp_path / "masked.onnx", "--t0", "0.5", "--steps", "3", "--mask")
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    succeed(run("edit_cpp", edit, guide, "cpp.png", "--seed", "7", "--mask", "mask.png", "--threads", "1"))
    changed = pixels_of(tmp_path / "cpp.png") != pixels_of(guide)
    assert not changed[:, :6].any()
    assert changed[:, 6:].any()
    done = run("edit_cpp", edit, guide, "out.png")
    assert (done.returncode, done.stderr) == (1, f"error: {edit}: wants --mask\n")


def test_a_file_that_is_no_edit_is_refused(run, network, guide):
    done = run("edit_cpp", network, guide, "out.png")
    assert done.returncode == 1
    assert done.stderr == f"error: {network}: is no edit (inputs guide and seed): sdedit export --loop\n"


# --- edit_trt: the device loop for a C++ host, without a device --------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """What the stand-in for TensorRT takes for a plan of the small model."""
    (tmp_path / "model.plan").write_text(f"linear 3 8 12 {SLOPE} {OFFSET}")
    return tmp_path / "model.plan"


@pytest.mark.parametrize("sampler", ["ancestral", "er-sde"])
def test_the_device_loop_in_cpp_makes_the_picture_that_python_makes(sampler, run, network, guide, table, plan):
    rows = table(network, "--t0", "0.5", "--steps", "6", "--sampler", sampler)
    arguments = (plan, guide, "trt.png", "--fatbin", kernels.FATBIN, "--table", rows, "--seed", str(MASK64))
    assert "6 steps" in succeed(run("edit_trt", *arguments))

    opened = sdedit.load(network, backend="ort-cpu", threads=1)
    steps = sdedit.plan(opened.sde, t0=0.5, steps=6, sampler=sampler)
    start = np.moveaxis(pixels_of(guide).astype(np.float32) / np.float32(127.5) - 1, 2, 0)[None]
    executor = HostExecutor(lambda x, sigma: SLOPE * x + (OFFSET / (1 + sigma)).reshape(-1, 1, 1, 1))
    x, _ = executor.run(Batch(start, None, [MASK64], steps, 1), None)
    assert np.array_equal(pixels_of(guide.with_name("trt.png")), to_pixels(x[0]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("something else", "TensorRT: the engine was made by another version\nerror: {}: is no plan for this"),
        ("linear 3 16 12 0.9 0.05", "error: {}: does not take one image of the size in the table"),
        ("linear 3 8 12 3e38 0.05", "error: NaN or Inf at step 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error(text, said, run, network, guide, table, plan):
    rows = table(network, "--steps", "2")
    plan.write_text(text)
    done = run("edit_trt", plan, guide, "trt.png", "--fatbin", kernels.FATBIN, "--table", rows)
    assert done.returncode == 1
    assert done.stderr.startswith(said.format(plan))


def test_kernels_that_are_none_are_an_error(run, network, guide, table, plan):
    done = run("edit_trt", plan, guide, "trt.png", "--fatbin", guide, "--table", table(network, "--steps", "2"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: cuModuleLoadData")


# --- building ----------------------------------------------------------------------------------------------------


def test_the_c_library_is_a_target(built):
    library = ctypes.CDLL(str(built.folder / "libsdedit.so"))
    assert library.sdedit_interface() == 1


def test_what_is_missing_leaves_a_program_out_by_name(tmp_path):
    said = configure(tmp_path, "-DCMAKE_DISABLE_FIND_PACKAGE_PNG=ON", "-DONNXRUNTIME_INCLUDE_DIR=/")
    for name in ("edit_cpp", "step_cpp", "edit_trt"):
        assert f"{name} is not built: PNG_FOUND was not found, see README.md in {SOURCES}" in said


def test_the_programs_are_short():
    lines = {name: len((SOURCES / f"{name}.cpp").read_text("utf-8").splitlines()) for name in ("edit_cpp", "step_cpp")}
    assert max(lines.values()) < 150


def test_the_table_that_python_prints_is_the_one_that_is_read(network, table):
    """The keys that step_table.h looks for."""
    printed = json.loads(table(network, "--steps", "2").read_text("utf-8"))
    assert {"channels", "height", "width"} <= printed["metadata"]["image"].keys()
    assert printed["table"]["version"] == 1
    assert printed["table"]["columns"] == ["sigma", "a", "b", "c", "d", "sigma_next"]
