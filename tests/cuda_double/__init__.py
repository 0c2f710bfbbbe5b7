"""A driver double: a stand-in for libcuda.so.1 on the CPU, so that the driver ports can be tested without a GPU.

It shows that arguments are packed, calls ordered, elements indexed and errors handled rightly, through the real
bindings. It is not a GPU: it says nothing about speed, memory models or races (though it looks for some, see below).

    library = build(folder, [Path("tests/cuda_double/kernels.cpp")])
    double = load(library)
    double.fail("cuMemAlloc", 2)

A source includes the .cu file and registers its kernels:

    #include "cuda_shim.h"
    #include "step.cu"
    DOUBLE_KERNEL(step, step_argument)

It is stricter than a driver: nothing works without a context; ranges are checked against live allocations; memory
that was not written, or was freed, reads as NaN; writes around an allocation, null pointers, misaligned vector
accesses and barriers that some threads miss are errors at the launch; graph nodes that do not depend on each other
run in the opposite order; a module must look like one, a launch must fit. With `defer`, streams work as late as they
may.

A process in which it was loaded has a GPU for all its other libraries too, and can never lose it. So what uses it
runs in a process of its own: `isolated(file)` runs pytest on a file there.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
_BOTH = ["-std=c++17", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
# Alignment is checked because x86 forgives what a GPU does not; _FORTIFY_SOURCE because it forbids changing stacks.
_KERNELS = [*_BOTH, "-O2", "-ffp-contract=off", "-fno-math-errno", "-fsanitize=alignment"]
_DRIVER = [*_BOTH, "-O1", "-U_FORTIFY_SOURCE"]


def build(folder: Path, sources: Sequence[Path]) -> Path:
    """Compile the double with these kernel sources -> its libcuda.so.1, made once in `folder` for the same contents."""
    objects = [_object(folder, FOLDER / "libcuda_double.cpp", _DRIVER)]
    objects += [_object(folder, source, _KERNELS) for source in sources]
    home = folder / _digest(*(path.name for path in objects))
    home.mkdir(exist_ok=True)
    library = home / "libcuda.so.1"
    if not library.exists():
        _compile(library, ["-shared", "-Wl,-soname,libcuda.so.1", *map(str, objects), "-ldl"])
    return library


def _object(folder: Path, source: Path, flags: list[str]) -> Path:
    command = ["g++", *flags, f"-I{FOLDER}", str(source)]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True, text=True).stdout
    made = folder / f"{source.stem}-{_digest(text, *flags)}.o"
    if not made.exists():
        _compile(made, ["-c", *command[1:]])
    return made


def _compile(target: Path, arguments: list[str]) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}")
    run = subprocess.run(["g++", *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{target.name} of the driver double does not compile:\n{run.stderr}")
    unfinished.replace(target)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load(library: Path) -> "Double":
    """Make `library` this process's CUDA driver, before anything looks for one: it will find this by its name."""
    return Double(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def isolated(file: Path, *arguments: str) -> None:
    """Run pytest on `file` in a process of its own, and raise AssertionError with its output where tests fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise AssertionError(f"pytest on {file.name}, in its own process:\n{run.stdout}{run.stderr}")


class Double:
    """What a test sees of the double, and how it interferes. Calls are named without their version: cuMemAlloc."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("log", "work", "live_objects"):
            getattr(library, f"double_{name}").restype = ctypes.c_char_p
        for name in ("live_bytes", "peak_bytes"):
            getattr(library, f"double_{name}").restype = ctypes.c_size_t

    def reset(self) -> None:
        """Forget logs, planned failures, attributes and modes; the peak starts from what is live. Objects stay."""
        self._library.double_reset()

    @property
    def calls(self) -> list[str]:
        """Driver calls since the reset."""
        return self._library.double_log().decode().splitlines()

    @property
    def work(self) -> list[str]:
        """What the device did since the reset: `kernel NAME GRID BLOCK`, `copy host to device BYTES`, `fill BYTES`."""
        return self._library.double_work().decode().splitlines()

    def fail(self, call: str, result: int, nth: int = 1) -> None:
        """Let the nth call of that name from now on return the CUresult `result` and do nothing."""
        self._library.double_fail(call.encode(), int(result), nth)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Device attribute, by its CUdevice_attribute number."""
        self._library.double_set_attribute(int(attribute), value)

    def defer(self, on: bool = True) -> None:
        """Streams work only when something waits for them: a missing wait shows as stale or NaN results."""
        self._library.double_defer(on)

    def run_backwards(self, on: bool = True) -> None:
        """Kernels run their last block and last thread first: what depends on their order shows."""
        self._library.double_run_backwards(on)

    @property
    def live_bytes(self) -> int:
        """Device memory allocated now."""
        return self._library.double_live_bytes()

    @property
    def peak_bytes(self) -> int:
        """Most device memory allocated at one time since the reset."""
        return self._library.double_peak_bytes()

    @property
    def live_objects(self) -> dict[str, int]:
        """How many there are now: contexts (retained), streams, events, modules, graphs, executables, allocations."""
        lines = self._library.double_live_objects().decode().splitlines()
        return {kind: int(count) for kind, count in (line.split() for line in lines)}
