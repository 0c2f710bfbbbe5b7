"""The C interface, from C and through ctypes: the same bits as the NumPy code, and an answer to every mistake."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from closed_form import SDES

import sdedit
from sdedit import executor as executors
from sdedit.capi import build as building
from sdedit.errors import SdeditError
from sdedit.image import to_pixels
from sdedit.noise import SPECIFICATION, Noise
from sdedit.schedule import SAMPLERS, StepTable
from sdedit.sde import from_metadata

PROGRAM = Path(__file__).parent / "c_abi" / "edit.c"
HEADER = building.FOLDER / building.HEADER
MASK64 = 2**64 - 1
SEEDS = (7, MASK64, 2**32)
SHAPE = (3, 5, 7)  # 105 elements: the last block of four is not whole
SDE = from_metadata(SDES["vp"])
OK, OTHER_INTERFACE, BAD_ARGUMENT, NOT_FINITE = range(4)

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, building.COMPILERS)), reason="needs a C++ compiler")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


class Batch(ctypes.Structure):
    """struct sdedit_batch."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("version", "images", "channels", "plane", "steps", "tables")),
        *((n, ctypes.c_void_p) for n in ("x", "sigma", "denoised", "previous", "guide", "mask", "table", "seeds")),
    ]


def denoiser(x, sigma):
    return x * np.float32(0.5) + np.float32(0.25)


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("capi")
    building.build(made)
    return made


@pytest.fixture(scope="module")
def library(folder: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(folder / building.LIBRARY))
    for name in ("sdedit_noise", "sdedit_message"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    made = folder / "edit"
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", f"-I{folder}", PROGRAM]
    subprocess.run([*command, f"-L{folder}", "-lsdedit", f"-Wl,-rpath,{folder}", "-o", made], check=True)
    return made


@pytest.fixture
def batch():
    """A batch whose every field is right, with the arrays that it points to."""
    table = sdedit.plan(SDE, t0=0.5, steps=3, sampler="er-sde")
    size = (2, *SHAPE)
    arrays = {
        "x": np.full(size, 0.5, np.float32),
        "sigma": np.zeros(2, np.float32),
        "denoised": np.zeros(size, np.float32),
        "previous": np.zeros(size, np.float32),
        "guide": np.zeros(size, np.float32),
        "table": table.rows.astype(np.float32),
        "seeds": np.arange(2, dtype=np.uint64),
    }
    made = Batch(version=1, images=2, channels=3, plane=35, steps=3, tables=1)
    for name, array in arrays.items():
        setattr(made, name, array.ctypes.data)
    made.arrays = arrays
    return made


# --- bits --------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("elements", [1, 4, 105, 12289])
@pytest.mark.parametrize("seed", SEEDS)
def test_normals_are_those_of_numpy(library, seed, elements, monkeypatch):
    monkeypatch.setenv("SDEDIT_NOISE", "numpy")
    out = np.full(elements + 1, 9, np.float32)
    for step, repeat, stream in ((0, 0, 0), (3, 2, 1), (100_000, 0, 0)):
        library.sdedit_normals(ctypes.c_uint64(seed), step, repeat, stream, elements, ctypes.c_void_p(out.ctypes.data))
        wanted = Noise([seed], (elements,))(step, repeat, stream)[0]
        assert np.array_equal(bits(out[:-1]), bits(wanted))
    assert out[-1] == 9  # nothing is written beyond


@needs_compiler
@needs_gcc
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_c_program_edits_as_python_does(program, sampler, repeats, masked):
    """Three images, whole edits: x bit for bit, and the pixels."""
    table = sdedit.plan(SDE, t0=0.5, steps=5, sampler=sampler)
    assert edited_in_c(program, table, repeats, masked) == edited_in_python(table, repeats, masked)


@needs_compiler
@needs_gcc
def test_every_image_may_have_its_own_table(program):
    table = StepTable.stack([sdedit.plan(SDE, t0=t0, steps=4) for t0 in (0.3, 0.5, 0.6)])
    assert edited_in_c(program, table, 1, True) == edited_in_python(table, 1, True)


@needs_compiler
@needs_gcc
def test_an_image_longer_than_a_piece_of_work_is_whole(program):
    table = sdedit.plan(SDE, t0=0.4, steps=2)
    shape = (3, 37, 41)  # 4551 elements
    assert edited_in_c(program, table, 2, True, shape) == edited_in_python(table, 2, True, shape)


def pictures(shape):
    """Pixels (B, H, W, C), and a mask (B, 1, H, W) of soft and hard edges."""
    random = np.random.default_rng(0)
    channels, height, width = shape
    mask = random.choice(np.float32([0, 0.25, 0.3, 1]), (len(SEEDS), 1, height, width))
    return random.integers(0, 256, (len(SEEDS), height, width, channels), np.uint8), mask


def edited_in_c(program, table, repeats, masked, shape=SHAPE):
    pixels, mask = pictures(shape)
    rows = table.rows.astype(np.float32)
    head = [len(SEEDS), shape[0], shape[1] * shape[2], table.steps, rows.size // (6 * table.steps), repeats, masked]
    parts = [np.array(head, np.uint32), np.array(SEEDS, np.uint64), rows, pixels, *([mask] if masked else [])]
    told = b"".join(part.tobytes() for part in parts)
    return subprocess.run([program], input=told, capture_output=True, check=True).stdout


def edited_in_python(table, repeats, masked, shape=SHAPE):
    pixels, mask = pictures(shape)
    guide = np.moveaxis(pixels.astype(np.float32) / np.float32(127.5) - np.float32(1), 3, 1).copy()
    executor = executors.HostExecutor(denoiser)
    x, _ = executor.run(executors.Batch(guide, mask if masked else None, SEEDS, table, repeats), None)
    out = np.stack([to_pixels(image) for image in x])
    return x.tobytes() + out.tobytes() + np.zeros(len(SEEDS), np.float32).tobytes()


# --- mistakes ----------------------------------------------------------------------------------------------------


@needs_compiler
def test_what_is_missing_or_out_of_range_is_a_bad_argument(library, batch):
    def answer(step=1, **changed):
        before = {name: getattr(batch, name) for name in changed}
        for name, value in changed.items():
            setattr(batch, name, value)
        found = library.sdedit_step(ctypes.byref(batch), step, 0)
        for name, value in before.items():
            setattr(batch, name, value)
        return found

    x = batch.arrays["x"].copy()
    for name in ("images", "channels", "plane", "steps"):
        assert answer(**{name: 0}) == BAD_ARGUMENT, name
    for name in ("x", "sigma", "denoised", "table", "seeds", "previous"):  # er-sde looks at the step before
        assert answer(**{name: None}) == BAD_ARGUMENT, name
    assert answer(tables=3) == BAD_ARGUMENT
    assert answer(channels=2**16, plane=2**16) == BAD_ARGUMENT
    assert answer(guide=None, mask=batch.arrays["x"].ctypes.data) == BAD_ARGUMENT
    assert answer(step=0) == answer(step=4) == BAD_ARGUMENT
    assert answer(version=2) == OTHER_INTERFACE
    assert library.sdedit_step(None, 1, 0) == library.sdedit_perturb(None, 0) == BAD_ARGUMENT
    assert library.sdedit_pixels(ctypes.byref(batch), None) == BAD_ARGUMENT
    assert library.sdedit_guide(ctypes.byref(batch), None, None) == BAD_ARGUMENT
    assert np.array_equal(x, batch.arrays["x"])
    assert answer() == OK


@needs_compiler
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_network_that_is_not_finite_changes_nothing(library, batch, value):
    x = batch.arrays["x"].copy()
    batch.arrays["denoised"][1, 2, 4, 6] = value
    assert library.sdedit_step(ctypes.byref(batch), 1, 0) == NOT_FINITE
    assert np.array_equal(batch.arrays["x"], x)


@needs_compiler
def test_sigma_is_the_network_s_next_input(library, batch):
    sigmas = batch.arrays["table"][:, 0]
    found = []
    assert library.sdedit_perturb(ctypes.byref(batch), 0) == OK
    for step in (1, 2, 3):
        found.append(batch.arrays["sigma"].copy())
        assert library.sdedit_step(ctypes.byref(batch), step, 0) == OK
    assert np.array_equal(np.stack(found), np.stack([sigmas, sigmas], 1))
    assert np.array_equal(batch.arrays["sigma"], [0, 0])


@needs_compiler
def test_results_have_words(library):
    said = [library.sdedit_message(result).decode() for result in (*range(4), 99)]
    assert said[OTHER_INTERFACE] == "the library has another interface version than the program"
    assert said[NOT_FINITE] == "the network returned NaN or Inf"
    assert len(set(said)) == 5


# --- the library -------------------------------------------------------------------------------------------------


@needs_compiler
def test_library_and_header_are_of_one_interface(library):
    assert f"#define SDEDIT_C_INTERFACE {library.sdedit_interface()}" in HEADER.read_text("utf-8")
    assert library.sdedit_noise().decode() == SPECIFICATION


@needs_compiler
def test_what_the_header_declares_is_all_that_is_exported(folder):
    declared = set(re.findall(r"^SDEDIT_API .*?(sdedit_\w+)\(", HEADER.read_text("utf-8"), re.MULTILINE))
    assert len(declared) == 8
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("needs nm")
    command = ["nm", "-D", "--defined-only", folder / building.LIBRARY]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == declared


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_is_plain_c_and_c_plus_plus(language):
    compiler, standard = {"c": ("gcc", "c99"), "c++": ("g++", "c++17")}[language]
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-std={standard}", "-fsyntax-only"]
    subprocess.run([compiler, *flags, "-x", language, HEADER], check=True)


@needs_compiler
def test_the_header_lies_beside_the_library(folder):
    assert (folder / building.HEADER).read_bytes() == HEADER.read_bytes()


# --- building it -------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_not_created(tmp_path):
    with pytest.raises(SdeditError, match=r"nowhere: no such folder"):
        building.build(tmp_path / "nowhere")


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SdeditError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+, clang\+\+ is on PATH") as found:
        building.build(tmp_path)
    assert found.value.hint == "apt-get install g++, or set CXX"


def test_a_compiler_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(SdeditError, match="no-such-compiler: No such file"):
        building.build(tmp_path)


def test_what_the_compiler_says_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"too old\")'")
    with pytest.raises(SdeditError, match="failed:\ntoo old") as found:
        building.build(tmp_path)
    assert "C++17" in found.value.hint


def test_the_command_ends_with_1_and_a_hint(tmp_path):
    command = [sys.executable, "-m", "sdedit.capi.build", "-o", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\nhint: create it first\n"
