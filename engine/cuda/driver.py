"""The few calls of the CUDA driver that the device loop needs, behind one protocol.

pycuda is taken where it imports, cuda-core's bindings otherwise; SDEDIT_CUDA=pycuda or cuda-core forces one. Both use
the primary context, the one that PyTorch and CuPy use too, of the first GPU that CUDA_VISIBLE_DEVICES shows, and make
it current only for the time of a call.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import BackendUnavailable, DeviceError, OptionError

if TYPE_CHECKING:
    from sdedit.cuda.graphs import Graphs

VARIABLE = "SDEDIT_CUDA"
PORTS = {"pycuda": "sdedit.cuda.pycuda_port", "cuda-core": "sdedit.cuda.bindings_port"}  # best first
PACKAGES = {"pycuda": "pycuda", "cuda-core": "tensorrt"}  # the extra that brings each

Handle = Any  # a module, function or event, as the port has it
Pinned = NDArray[np.uint8]  # page-locked host memory, which copies run beside


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as it decides which plans and kernels it runs."""

    name: str
    compute_capability: tuple[int, int]
    driver: str  # the driver's own version where the system says it, and the CUDA version that it speaks

    @property
    def target(self) -> str:
        """What plans and kernels are built for, such as sm_90."""
        return target_of(self.compute_capability)


def target_of(compute_capability: tuple[int, int]) -> str:
    """(8, 6) -> sm_86"""
    return f"sm_{compute_capability[0]}{compute_capability[1]}"


def driver_text(number: int) -> str:
    """The driver's version, from what cuDriverGetVersion returns: "580.95.05, CUDA 13.0"."""
    cuda = f"CUDA {number // 1000}.{number % 1000 // 10}"
    try:
        return f"{Path('/sys/module/nvidia/version').read_text('ascii').strip()}, {cuda}"
    except (OSError, ValueError):  # not Linux, or hidden in a container
        return cuda


class Driver(Protocol):
    """A port. Streams are CUstream handles and device memory is addresses, as integers.

    Every call but `current` wants the context current. Every call raises DeviceError that names the CUDA call.
    """

    name: str
    gpu: Gpu
    versions: Mapping[str, str]
    graphs: "Graphs | None"

    def current(self) -> AbstractContextManager[None]:
        """Make the primary context current in this thread, and what was before current again."""
        ...

    def make_stream(self) -> int:
        """A new stream that does not wait for the default one."""
        ...

    def free_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def allocate(self, nbytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def allocate_pinned(self, nbytes: int) -> Pinned: ...

    def free_pinned(self, memory: Pinned) -> None: ...

    def upload(self, pointer: int, pinned: NDArray[Any], stream: int) -> None: ...

    def download(self, pinned: NDArray[Any], pointer: int, stream: int) -> None: ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Device to device."""
        ...

    def load(self, image: bytes) -> Handle: ...

    def unload(self, module: Handle) -> None: ...

    def function(self, module: Handle, name: str) -> Handle: ...

    def launch(
        self, function: Handle, grid: tuple[int, int], block: int, parameters: NDArray[Any], stream: int
    ) -> None:
        """parameters: the kernel's one argument, a structure passed by value."""
        ...

    def make_event(self) -> Handle: ...

    def free_event(self, event: Handle) -> None: ...

    def record(self, event: Handle, stream: int) -> None: ...

    def wait(self, event: Handle) -> None:
        """Until the stream has come to the recorded event; at once for one that was never recorded."""
        ...

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        """Between two recorded events that have been reached."""
        ...


@cache
def open_driver() -> Driver:
    """The port to use, opened once a process. Raises BackendUnavailable, with the cause and the fix."""
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in PORTS:
        raise OptionError(f"{VARIABLE} is {forced!r}", hint=f"choose {' or '.join(PORTS)}, or unset it")
    missing = []
    for name in PORTS if forced is None else (forced,):
        try:
            driver: Driver = import_module(PORTS[name]).open_port()
            return driver
        except ImportError as error:
            missing.append(f"{name} cannot be imported ({error})")
    raise BackendUnavailable(
        f"no way to call CUDA: {'; '.join(missing)}",
        hint=f"pip install 'sdedit-engine[{PACKAGES[forced or 'cuda-core']}]'",
    )


def failed(call: str, name: str, text: str) -> DeviceError:
    """The error for a CUDA call that returned `name`, such as CUDA_ERROR_OUT_OF_MEMORY."""
    hint = "'sdedit doctor' says what works; after an error the process must start anew"
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        hint = "use a smaller --batch, or free the GPU ('nvidia-smi' shows who has its memory)"
    elif name in ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_INVALID_IMAGE"):
        hint = "the kernels want a GPU from Turing on (compute capability 7.5) and driver 580 or later"
    return DeviceError(f"{call} failed: {name} ({text})", hint=hint)


def unavailable(call: str, name: str, text: str) -> BackendUnavailable:
    """The error for a CUDA that does not start."""
    hints = {
        "CUDA_ERROR_NO_DEVICE": "check CUDA_VISIBLE_DEVICES and 'nvidia-smi'",
        "CUDA_ERROR_INSUFFICIENT_DRIVER": "update the NVIDIA driver",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot: the driver was updated while in use",
    }
    return BackendUnavailable(
        f"CUDA does not start: {call}: {name} ({text})",
        hint=hints.get(name, "'nvidia-smi' must work; in a container, run it with --gpus all"),
    )


def require_library() -> None:
    """Raise BackendUnavailable on a machine without libcuda."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(
            f"CUDA does not start: libcuda was not found ({error})",
            hint="install the NVIDIA driver; without an NVIDIA GPU, use --backend ort-cpu",
        ) from error
