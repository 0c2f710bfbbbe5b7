"""The kernels that the package ships: what they were made from, for which GPUs, and how well they came out."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdedit.cuda import compile as compiling
from sdedit.cuda import kernels

MANIFEST = json.loads(kernels.FATBIN.with_suffix(".json").read_text("utf-8"))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("kernels")
    return folder, *compiling.compile_kernels(folder)


def test_the_shipped_kernels_were_made_from_these_sources():
    assert MANIFEST["source_sha256"] == compiling.source_sha256(), "python -m sdedit.cuda.compile"
    assert MANIFEST["fatbin_sha256"] == hashlib.sha256(kernels.FATBIN.read_bytes()).hexdigest()


def test_they_are_for_every_architecture_from_turing_on():
    assert MANIFEST["architectures"] == [f"sm_{a}" for a in (75, 80, 86, 89, 90, 100, 120)]
    assert MANIFEST["ptx"] == "compute_75"


def test_the_interface_that_python_fills_is_the_header_s(tmp_path):
    """Sizes and offsets, as a C++ compiler sees them."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    prints = [
        f'std::printf("{name} %zu\\n", offsetof({struct}, {name}));'
        for struct, kind in (("sdedit_edit", kernels.EDIT), ("sdedit_state", kernels.STATE))
        for name in kind.names
    ]
    program = tmp_path / "offsets.cpp"
    program.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{compiling.FOLDER / "sdedit.cuh"}"\nint main() {{\n'
        + "\n".join(prints)
        + '\nstd::printf("%zu %zu %d", sizeof(sdedit_edit), sizeof(sdedit_state), SDEDIT_INTERFACE);\n}\n'
    )
    subprocess.run(
        ["g++", "-Wall", "-Wextra", "-Werror", "-std=c++17", program, "-o", tmp_path / "offsets"], check=True
    )
    *offsets, sizes = subprocess.run([tmp_path / "offsets"], capture_output=True, text=True).stdout.splitlines()
    ours = [f"{name} {kind.fields[name][1]}" for kind in (kernels.EDIT, kernels.STATE) for name in kind.names]
    assert offsets == ours
    assert sizes == f"{kernels.EDIT.itemsize} {kernels.STATE.itemsize} {kernels.INTERFACE}"


def test_kernels_take_whole_images_of_any_size():
    assert kernels.grid(1, 3) == (1, 3)
    assert kernels.grid(4 * kernels.THREADS, 1) == (1, 1)
    assert kernels.grid(4 * kernels.THREADS + 1, 1) == (2, 1)
    assert kernels.pixel_grid(kernels.THREADS + 1, 2) == (2, 2)
    assert np.prod(kernels.grid(3 * 1024 * 1024, 1)) * kernels.THREADS * 4 >= 3 * 1024 * 1024


@needs_nvcc
def test_the_same_compiler_makes_the_same_bytes(compiled):
    folder, manifest, _ = compiled
    if manifest["nvcc"] != MANIFEST["nvcc"]:
        pytest.skip(f"nvcc is {manifest['nvcc']}, the shipped kernels were made by {MANIFEST['nvcc']}")
    assert (folder / "sdedit.fatbin").read_bytes() == kernels.FATBIN.read_bytes()


@needs_nvcc
def test_nothing_is_spilled_on_any_architecture(compiled):
    _, _, said = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == 3 * len(compiling.ARCHITECTURES)
    assert set(spills) == {("0", "0", "0")}


@needs_nvcc
def test_registers_leave_room_for_full_blocks(compiled):
    """At most 64 registers: 1,024 threads on a multiprocessor's 65,536."""
    _, _, said = compiled
    used = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(used) == 3 * len(compiling.ARCHITECTURES)
    assert max(used) <= 64


@needs_nvcc
def test_aligned_images_move_in_128_bit_accesses_and_products_are_not_fused(tmp_path):
    command = ["nvcc", "-ptx", "-std=c++17", "-O3", "-arch=compute_90", "-o", tmp_path / "step.ptx", "sdedit.cu"]
    subprocess.run(command, cwd=compiling.FOLDER, check=True)
    ptx = (tmp_path / "step.ptx").read_text()
    step = ptx[ptx.index(".entry sdedit_step") :]
    assert len(re.findall(r"ld\.global(\.nc)?\.v4\.(f32|b32|u32)", step)) >= 4  # D, x, D_previous, guide
    assert len(re.findall(r"st\.global\.v4\.(f32|b32|u32)", step)) >= 2  # x, D_previous
    assert "fma.rn.f32" not in ptx
