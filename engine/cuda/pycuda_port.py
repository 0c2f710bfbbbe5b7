"""The driver port on pycuda. It has no CUDA graphs: those come from cuda.bindings where that is installed."""

import atexit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.cuda.bindings_port import Calls
from sdedit.cuda.driver import Gpu, Handle, Pinned, driver_text, failed, require_library, unavailable
from sdedit.cuda.graphs import Graphs
from sdedit.errors import DeviceError, SdeditError

NAMES = {  # of the results that have a hint of their own, by pycuda's words
    "out of memory": "CUDA_ERROR_OUT_OF_MEMORY",
    "no device": "CUDA_ERROR_NO_DEVICE",
    "invalid image": "CUDA_ERROR_INVALID_IMAGE",
    "no binary for gpu": "CUDA_ERROR_NO_BINARY_FOR_GPU",
}
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for


def open_port() -> "PycudaPort":
    """CUDA on the first device. Raises BackendUnavailable, ImportError."""
    require_library()
    import pycuda
    import pycuda.driver as cu

    with explaining(cu, unavailable):
        cu.init()
        if cu.Device.count() == 0:
            raise unavailable("cuDeviceGetCount", "CUDA_ERROR_NO_DEVICE", "no GPU")
        return PycudaPort(cu, cu.Device(0), pycuda.VERSION_TEXT)


@contextmanager
def explaining(cu: Any, explain: Callable[[str, str, str], SdeditError] = failed) -> Iterator[None]:
    """Turn pycuda's errors into ours. It says "cuMemAlloc failed: out of memory", not the result's name."""
    try:
        yield
    except cu.Error as error:
        call, _, text = str(error).partition(" failed: ")
        name = next((name for words, name in NAMES.items() if words in text), type(error).__name__)
        raise explain(call, name, text) from error


class PycudaPort:
    """See sdedit.cuda.driver.Driver."""

    name = "pycuda"

    def __init__(self, cu: Any, device: Any, version: str) -> None:
        self._cu = cu
        self.gpu = Gpu(device.name(), tuple(device.compute_capability()), driver_text(cu.get_driver_version()))
        self.versions: Mapping[str, str] = {"pycuda": version}
        self._context = device.retain_primary_context()
        atexit.register(self._detach)  # or pycuda complains of it when the interpreter ends
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self.graphs: Graphs | None
        try:
            self.graphs = Graphs(Calls())
        except ImportError:
            self.graphs = None

    def _detach(self) -> None:
        context, self._context = self._context, None
        context.detach()

    @contextmanager
    def current(self) -> Iterator[None]:
        if self._context is None:  # what an editor's end frees, the process's end does
            raise DeviceError("the interpreter is ending", hint="close editors before it does")
        with explaining(self._cu):
            self._context.push()
        try:
            yield
        finally:
            self._cu.Context.pop()

    def make_stream(self) -> int:
        with explaining(self._cu):
            stream = self._cu.Stream(NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def free_stream(self, stream: int) -> None:
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with explaining(self._cu):
            self._streams[stream].synchronize()

    def allocate(self, nbytes: int) -> int:
        with explaining(self._cu):
            memory = self._cu.mem_alloc(nbytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        with explaining(self._cu):
            self._memory.pop(pointer).free()

    def allocate_pinned(self, nbytes: int) -> Pinned:
        with explaining(self._cu):
            memory: Pinned = self._cu.pagelocked_empty(nbytes, np.uint8)
        return memory

    def free_pinned(self, memory: Pinned) -> None:
        with explaining(self._cu):
            memory.base.free()  # type: ignore[union-attr]

    def upload(self, pointer: int, pinned: NDArray[Any], stream: int) -> None:
        with explaining(self._cu):
            self._cu.memcpy_htod_async(pointer, pinned, self._streams[stream])

    def download(self, pinned: NDArray[Any], pointer: int, stream: int) -> None:
        with explaining(self._cu):
            self._cu.memcpy_dtoh_async(pinned, pointer, self._streams[stream])

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        with explaining(self._cu):
            self._cu.memcpy_dtod_async(target, source, nbytes, self._streams[stream])

    def load(self, image: bytes) -> Handle:
        with explaining(self._cu):
            return self._cu.module_from_buffer(image)

    def unload(self, module: Handle) -> None:
        pass  # pycuda does with its last reference

    def function(self, module: Handle, name: str) -> Handle:
        with explaining(self._cu):
            return module.get_function(name)

    def launch(
        self, function: Handle, grid: tuple[int, int], block: int, parameters: NDArray[Any], stream: int
    ) -> None:
        with explaining(self._cu):
            function._launch_kernel((*grid, 1), (block, 1, 1), parameters.tobytes(), 0, self._streams[stream])

    def make_event(self) -> Handle:
        with explaining(self._cu):
            event = self._cu.Event()
        self._events[id(event)] = event
        return id(event)

    def free_event(self, event: Handle) -> None:
        del self._events[event]  # its last reference: pycuda frees it

    def record(self, event: Handle, stream: int) -> None:
        with explaining(self._cu):
            self._events[event].record(self._streams[stream])

    def wait(self, event: Handle) -> None:
        with explaining(self._cu):
            self._events[event].synchronize()

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        with explaining(self._cu):
            return float(self._events[start].time_till(self._events[end]))
