"""ONNX Runtime's CUDA and TensorRT execution providers, inside the device loop where a driver port is installed."""

import contextlib
import ctypes
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.backends.ort import OrtBackend
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, no_library, open_driver
from sdedit.errors import BackendUnavailable, NetworkError, OptionError
from sdedit.executor import DeviceExecutor, Executor, HostExecutor
from sdedit.tensorrt import cache

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

log = logging.getLogger(__name__)


def require_libraries(name: str) -> None:
    """Raise BackendUnavailable that names the library which the provider of `name` lacks.

    ONNX Runtime itself would log it, go on without the provider, and compute on the CPU.
    """
    import onnxruntime

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raised = no_library(error)
        raise BackendUnavailable(f"{name}: {raised}", hint=raised.hint) from error
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            onnxruntime.preload_dlls(directory="")  # what it cannot find is found missing below
    if name == "ort-tensorrt" and find_spec("tensorrt") is not None:
        with suppress(ImportError, OSError):
            import_module("tensorrt")  # loads its libraries, which the provider then finds by their names
    if missing := missing_library(name):
        hint = "pip install 'sdedit-engine[cuda]'"
        if "libnvinfer" in missing:
            hint = f"pip install 'tensorrt=={wanted_tensorrt()}.*'; or use --backend tensorrt, which takes any"
        raise BackendUnavailable(f"{name}: a library that it needs does not load: {missing}", hint=hint)


def missing_library(name: str) -> str | None:
    """What the system's loader says of the provider's library; None where it loads."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    kind = "tensorrt" if name == "ort-tensorrt" else "cuda"
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / pattern.format(kind)))
    except OSError as error:
        return str(error)
    return None


def wanted_tensorrt() -> str | None:
    """The major version of TensorRT that this ONNX Runtime's provider was linked with; None where it has none."""
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    linked = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()) if library.is_file() else None
    return linked[1].decode() if linked else None


class OrtGpuBackend(OrtBackend):
    """A session on a stream of ours in the device loop; in the host loop, with copies at every step, where neither
    pycuda nor cuda-core's bindings are installed.
    """

    def __init__(self, artifact: Artifact, name: str, provider_options: Mapping[str, str] | None = None) -> None:
        self._given = dict(provider_options or {})
        self._driver: Driver | None = None
        self._stream: int | None = None
        self._lock = Lock()
        try:
            self._driver = open_driver()
        except BackendUnavailable as error:
            log.info("%s: tensors are copied at every step: %s; fix: %s", name, error, error.hint)
        else:
            with self._driver.current():
                self._stream = self._driver.make_stream()  # for the life of the session
        super().__init__(artifact, name, threads=1)
        self.provider_options = self._given
        if self._driver is not None:
            self.versions = {**self.versions, **self._driver.versions}

    def _open(self, told: Mapping[str, str]) -> Any:
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # what it would log is in the error below
        told = self._provider_defaults() | self._given
        try:
            session = super()._open(told)
        except Exception as error:  # onnxruntime raises its own kinds, and RuntimeError
            raise BackendUnavailable(
                f"{self.name}: {str(error).splitlines()[0]}", hint="'sdedit doctor' says what works"
            ) from error
        if session.get_providers()[0] != self.provider:
            raise BackendUnavailable(f"{self.name}: {self.provider} did not come up", hint="SDEDIT_DEBUG=1 shows why")
        return session

    def _provider_defaults(self) -> dict[str, str]:
        stream = {} if self._stream is None else {"user_compute_stream": str(self._stream)}
        if self.name == "ort-cuda":
            return {"use_tf32": "0", **stream}  # float32 means float32
        folder = cache.folder().with_name("ort-tensorrt")
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
        return kept | ({"has_user_compute_stream": "1", **stream} if stream else {})

    @contextmanager
    def executor(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> Iterator[Executor]:
        if self._driver is None:
            yield HostExecutor(self.bind(batch, conditions, size))
            return
        with self._driver.current(), self.device_loop(batch, conditions, self._stream, size) as loop:
            yield DeviceExecutor(loop)

    @contextmanager
    def device_loop(
        self, batch: int, conditions: Mapping[str, float], stream: int | None, size: tuple[int, int] | None = None
    ) -> Iterator[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block. Wants the context current."""
        if stream not in (None, self._stream):
            raise OptionError(f"{self.name} runs on a stream of its own", hint="leave the stream out, or use tensorrt")
        shape = self._shape(batch, size)
        with self._lock:  # the session has one stream
            loop = DeviceLoop(self.driver, self.network(batch, conditions, size), shape, stream=self._stream)
            try:
                yield loop
            finally:
                loop.close()

    def network(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> DeviceNetwork:
        """The network by itself, for batches of this size."""
        return OrtDeviceNetwork(self._session, self._shape(batch, size), self._extra(batch, conditions))

    def on_gpu(self) -> "GpuBackend":
        if self._driver is None:
            raise OptionError(f"{self.name} needs a CUDA driver port for this", hint="pip install cuda-bindings")
        return self

    @property
    def driver(self) -> Driver:
        """What calls CUDA, where the device loop runs."""
        assert self._driver is not None
        return self._driver


class OrtDeviceNetwork:
    """A session bound to tensors on the GPU, on the stream it was made with. See device_loop.DeviceNetwork.

    Not captured from outside: the provider may allocate while it runs. It has a graph of its own, for models whose
    every node runs on the GPU: provider option enable_cuda_graph=1.
    """

    capturable = False

    def __init__(self, session: Any, shape: tuple[int, int, int, int], extra: Mapping[str, NDArray[Any]]) -> None:
        import onnxruntime

        self._session, self._shape = session, shape
        self._binding = session.io_binding()
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for name, values in extra.items():
            self._binding.bind_cpu_input(name, values)

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        self._binding.bind_input("x", "cuda", 0, np.float32, self._shape, x)
        self._binding.bind_input("sigma", "cuda", 0, np.float32, self._shape[:1], sigma)
        self._binding.bind_output("denoised", "cuda", 0, np.float32, self._shape, denoised)

    def enqueue(self, stream: int) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises its own kinds
            raise NetworkError(
                f"ONNX Runtime failed: {str(error).splitlines()[0]}", hint="check the model with 'sdedit inspect'"
            ) from error

    def close(self) -> None:
        self._binding = None
