"""The driver port on cuda-core's bindings (cuda.bindings.driver)."""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.cuda.driver import Gpu, Handle, Pinned, driver_text, failed, require_library, unavailable
from sdedit.cuda.graphs import Graphs


class Calls:
    """cuda.bindings.driver, every call checked. Raises ImportError where it is not installed."""

    def __init__(self) -> None:
        import cuda.bindings.driver as cu

        self.cu: Any = cu

    def __call__(self, name: str, *arguments: Any, error: Callable[..., Exception] = failed) -> Any:
        """The value of one driver call. Raises what `error` makes of the call's name and its result."""
        try:
            result, *values = getattr(self.cu, name)(*arguments)
        except RuntimeError as raised:  # the bindings' own, where the driver lacks the call; or there is no driver
            raise error(name, "CUDA_ERROR_NOT_FOUND", str(raised)) from raised
        if result != self.cu.CUresult.CUDA_SUCCESS:
            text = self.cu.cuGetErrorString(result)[1]
            raise error(name, result.name, text.decode() if text else "unknown error")
        return values[0] if values else None


def open_port() -> "BindingsPort":
    """CUDA on the first device. Raises BackendUnavailable, ImportError."""
    require_library()
    call = Calls()
    call("cuInit", 0, error=unavailable)
    if call("cuDeviceGetCount", error=unavailable) == 0:
        raise unavailable("cuDeviceGetCount", "CUDA_ERROR_NO_DEVICE", "no GPU")
    return BindingsPort(call, call("cuDeviceGet", 0))


class BindingsPort:
    """See sdedit.cuda.driver.Driver."""

    name = "cuda-core"

    def __init__(self, call: Calls, device: Any) -> None:
        self._call = call
        attribute = call.cu.CUdevice_attribute
        capability = tuple(
            self._call("cuDeviceGetAttribute", which, device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self._call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        self.gpu = Gpu(name, (capability[0], capability[1]), driver_text(call("cuDriverGetVersion")))
        self.versions: Mapping[str, str] = {"cuda-bindings": version("cuda-bindings")}
        self._context = self._call("cuDevicePrimaryCtxRetain", device, error=unavailable)
        self._pinned: dict[int, int] = {}
        self.graphs: Graphs | None = Graphs(self._call)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def make_stream(self) -> int:
        return int(self._call("cuStreamCreate", self._call.cu.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def free_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, pointer: int) -> None:
        self._call("cuMemFree", pointer)

    def allocate_pinned(self, nbytes: int) -> Pinned:
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        memory: Pinned = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        self._pinned[id(memory)] = address
        return memory

    def free_pinned(self, memory: Pinned) -> None:
        self._call("cuMemFreeHost", self._pinned.pop(id(memory)))

    def upload(self, pointer: int, pinned: NDArray[Any], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", pointer, pinned.ctypes.data, pinned.nbytes, stream)

    def download(self, pinned: NDArray[Any], pointer: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", pinned.ctypes.data, pointer, pinned.nbytes, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    def load(self, image: bytes) -> Handle:
        return self._call("cuModuleLoadData", image)

    def unload(self, module: Handle) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: Handle, name: str) -> Handle:
        return self._call("cuModuleGetFunction", module, name.encode())

    def launch(
        self, function: Handle, grid: tuple[int, int], block: int, parameters: NDArray[Any], stream: int
    ) -> None:
        pointers = (ctypes.c_void_p * 1)(parameters.ctypes.data)
        self._call("cuLaunchKernel", function, *grid, 1, block, 1, 1, 0, stream, ctypes.addressof(pointers), 0)

    def make_event(self) -> Handle:
        return self._call("cuEventCreate", 0)

    def free_event(self, event: Handle) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Handle, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, event: Handle) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self._call("cuEventElapsedTime", start, end))
