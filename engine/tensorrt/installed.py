"""Finding TensorRT, its log, and the GPU it would build for.

TensorRT 10.x, TensorRT 11.x and TensorRT-RTX have one Python API under two import names. Where they differ, the
difference is a property of Library; enum values differ too, so that they are always taken from the module.
"""

import ctypes
import re
import sys
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sdedit.cuda.driver import Gpu, driver_text
from sdedit.errors import BackendUnavailable, OptionError

LIBRARIES = ("tensorrt", "tensorrt-rtx")  # the preferred first; the extras have the same names
OLDEST = {"tensorrt": (10, 1), "tensorrt-rtx": (1, 4)}  # 10.1: device_memory_size_v2 and set_device_memory
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
MOST_MESSAGES = 100_000
NO_DRIVER = "catchCudaError"  # what follows each real error in the log where there is no driver


_loggers: list[Any] = []  # TensorRT may go on using one after everything else that was made with it is gone


@dataclass(frozen=True)
class Library:
    """An imported TensorRT."""

    name: str  # one of LIBRARIES
    module: Any
    version: str

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not here."""
        return self.name == "tensorrt-rtx"

    @property
    def ahead_of_time_targets(self) -> tuple[str, ...]:
        """The GPU architectures it can be told to build for, as sm_86."""
        if not self.ahead_of_time:
            return ()
        members = self.module.ComputeCapability.__members__
        return tuple(f"sm_{name[2:]}" for name in members if re.fullmatch(r"SM\d+", name))

    def logger(self, severity: str = "WARNING") -> Any:
        """A TensorRT logger that keeps what is said at `severity` or worse.

        Its `messages` are pairs of severity and text; `last_error()` is the one to quote, or None.
        """
        wanted = set(SEVERITIES[: SEVERITIES.index(severity) + 1])

        base: Any = self.module.ILogger

        class Logger(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.messages: deque[tuple[str, str]] = deque(maxlen=MOST_MESSAGES)

            def log(self, level: Any, text: str) -> None:  # called from TensorRT's threads; must not raise
                if level.name in wanted:
                    self.messages.append((level.name, text))

            def last_error(self) -> str | None:
                errors = [text for level, text in list(self.messages) if level in ("ERROR", "INTERNAL_ERROR")]
                told = [text for text in errors if NO_DRIVER not in text] or errors
                return plain(told[-1]) if told else None

        _loggers.append(Logger())
        return _loggers[-1]


def plain(text: str) -> str:
    """TensorRT's words on one line, without the places in its source code."""
    lines = [line for line in text.splitlines() if NO_DRIVER not in line] or text.splitlines()
    return re.sub(r"\s*\bIn [\w:~<>]+ at \S+?:\d+", "", " ".join(" ".join(lines).split()))


def open_library(name: str) -> Library:
    """Import the library called `name`. Raises BackendUnavailable with the cause and the pip command."""
    if name not in LIBRARIES:
        raise OptionError(f"unknown TensorRT library {name!r}", hint=f"choose one of {', '.join(LIBRARIES)}")
    package = name.replace("-", "_")
    install = f"pip install 'sdedit-engine[{name}]'"
    try:
        module = import_module(package)
    except ModuleNotFoundError as error:
        what = "is not installed" if error.name == package else f"needs {error.name}, which is not installed"
        raise BackendUnavailable(f"{name}: {what}", hint=install) from error
    except (ImportError, OSError) as error:  # the bindings are there, a library that they link is not
        missing = re.search(r"\b(lib)?nv\w+(\.so(\.\d+)*|\.dll)", str(error))
        what = f"{missing[0]} was not found" if missing else "cannot be imported"
        raise BackendUnavailable(
            f"{name}: {what}: {error}",
            hint=f"{install}; for a TensorRT installed otherwise, put its lib folder on "
            f"{'PATH' if sys.platform == 'win32' else 'LD_LIBRARY_PATH'}",
        ) from error
    version = str(getattr(module, "__version__", "0"))
    if _numbers(version) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        raise BackendUnavailable(
            f"{name}: version {version} is installed; wanted {oldest} or later",
            hint=f"pip install --upgrade 'sdedit-engine[{name}]'",
        )
    return Library(name, module, version)


def first_installed() -> Library:
    """TensorRT, else TensorRT-RTX. Raises BackendUnavailable that says why neither can be used."""
    causes = []
    for name in LIBRARIES:
        try:
            return open_library(name)
        except BackendUnavailable as error:
            causes.append(str(error))
    raise BackendUnavailable(
        f"no TensorRT here: {'; '.join(causes)}",
        hint="pip install 'sdedit-engine[tensorrt-rtx]' for GeForce and RTX, 'sdedit-engine[tensorrt]' for any GPU",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def gpu_here() -> Gpu:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses).

    Raises BackendUnavailable. Goes to the driver itself: TensorRT without a driver crashes more than it explains.
    """
    hint = "install NVIDIA's driver, or build for a GPU elsewhere: --backend tensorrt-rtx --target sm_86"
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver here: {library} was not found", hint=hint) from error

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(driver, name)(*arguments):
            raise BackendUnavailable(f"no usable NVIDIA GPU here: {name} returned {code}", hint=hint)

    device, number, text = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(number))
    if not number.value:
        raise BackendUnavailable("no NVIDIA GPU here: the driver shows none", hint=hint)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetName", text, len(text), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(number.value)
    call("cuDriverGetVersion", ctypes.byref(number))
    return Gpu(text.value.decode("utf-8", "replace"), (capability[0], capability[1]), driver_text(number.value))
