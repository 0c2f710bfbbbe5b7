"""ONNX Runtime's CUDA and TensorRT execution providers, inside the device loop where a driver port is installed."""

import contextlib
import ctypes
import io
import itertools
import logging
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from sdedit.artifact import Artifact, ExtraInput
from sdedit.backends import condition_values, require_open
from sdedit.backends.ort import OrtBackend
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, open_driver, require_library
from sdedit.cuda.kernels import require_kernels
from sdedit.cuda.pool import LoopPool
from sdedit.errors import BackendUnavailable, NetworkError, OptionError, SdeditError
from sdedit.executor import DeviceExecutor, Executor, HostExecutor
from sdedit.loop import Denoiser
from sdedit.tensorrt import cache

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

log = logging.getLogger(__name__)
graph_numbers = itertools.count(1)  # ONNX Runtime tells its own CUDA graphs apart by them


def require_libraries(name: str) -> None:
    """Raise BackendUnavailable that names the library which the provider of `name` lacks.

    ONNX Runtime itself would log it, go on without the provider, and compute on the CPU.
    """
    import onnxruntime

    try:
        require_library()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{name}: {error}", hint=error.hint) from error
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
    """What the system's loader says of the first of NVIDIA's libraries that the provider wants; None if all load.

    The provider itself is not loaded: it may only be by ONNX Runtime. Of a library that it names in several versions
    (cuDNN's frontend looks for any NVRTC) one is enough.
    """
    for library in linked_libraries("tensorrt" if name == "ort-tensorrt" else "cuda").values():
        said = [_load_error(version) for version in library]
        if None not in said:
            return said[0]
    return None


def _load_error(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def linked_libraries(kind: str) -> dict[str, list[str]]:
    """NVIDIA's libraries that this ONNX Runtime's provider of a kind ("cuda", "tensorrt") names: each one's versions,
    such as {"libcublas": ["libcublas.so.13"]}; {} off Linux.
    """
    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{kind}.so"
    found: dict[str, list[str]] = {}
    if provider.is_file():
        names = re.findall(rb"\0(lib(?:cu|nv)\w+\.so\.\d+)(?=\0)", provider.read_bytes())
        for name in dict.fromkeys(name.decode() for name in names):
            found.setdefault(name.split(".")[0], []).append(name)
    return found


def wanted_tensorrt() -> str | None:
    """The major version of TensorRT that this ONNX Runtime's provider was linked with; None where it has none."""
    linked = linked_libraries("tensorrt").get("libnvinfer")
    return linked[0].rpartition(".")[2] if linked else None


class OrtGpuBackend(OrtBackend):
    """A session on a stream of ours in the device loop; in the host loop, with copies at every step, where neither
    pycuda nor cuda-core's bindings are installed.
    """

    def __init__(self, artifact: Artifact, name: str, provider_options: Mapping[str, str] | None = None) -> None:
        self._given = dict(provider_options or {})
        self._driver: Driver | None = None
        self._stream: int | None = None
        self._lock = Lock()  # the session has one stream: one edit at a time
        try:
            self._driver = open_driver()
        except BackendUnavailable as error:
            log.info("%s: tensors are copied at every step: %s; fix: %s", name, error, error.hint)
        else:
            require_kernels(self._driver, name)
            with self._driver.current():
                self._stream = self._driver.make_stream()  # for the life of the session
        super().__init__(artifact, name, threads=1)
        self.provider_options = self._given
        self._pool = LoopPool()
        if self._driver is not None:
            self.versions = {**self.versions, **self._driver.versions}

    def _open(self) -> Any:
        import onnxruntime

        if os.environ.get("SDEDIT_DEBUG") != "1":
            onnxruntime.set_default_logger_severity(4)
        stream = {} if self._stream is None else {"user_compute_stream": str(self._stream)}
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0", **stream})  # float32 means float32
        providers = [(cuda[0], cuda[1] | self._given)]
        if self.name == "ort-tensorrt":
            folder = cache.folder().with_name("ort-tensorrt")
            folder.mkdir(parents=True, exist_ok=True)
            kept = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder), **stream}
            providers = [(self.provider, kept | self._given), cuda]  # what TensorRT does not take stays on the GPU
        try:
            session = self._session_with(providers)
        except Exception as error:  # onnxruntime raises its own kinds, and RuntimeError
            raise BackendUnavailable(
                f"{self.name}: {str(error).splitlines()[0]}", hint="'sdedit doctor' says what works"
            ) from error
        if session.get_providers()[0] != self.provider:
            raise BackendUnavailable(
                f"{self.name}: ONNX Runtime does not bring up {self.provider}",
                hint="pip install 'sdedit-engine[cuda]'; with SDEDIT_DEBUG=1 it logs why",
            )
        return session

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        with self._lock:
            return super().bind(batch, conditions, size)

    @contextmanager
    def executor(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> Iterator[Executor]:
        if self._driver is None:
            yield HostExecutor(self.bind(batch, conditions, size))
            return
        with self._driver.current(), self.device_loop(batch, conditions, size) as loop:
            yield DeviceExecutor(loop)

    @contextmanager
    def device_loop(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> Iterator[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block. Wants the context current."""
        require_open(self._session is None)
        shape, values = self._shape(batch, size), condition_values(self._artifact, conditions)
        with self._lock, self._pool.lease(shape, self._make_loop) as loop:
            loop.network.set_conditions(values, loop.stream)
            yield loop

    def network(self, batch: int) -> DeviceNetwork:
        """The network by itself, for batches of this size."""
        return self._network(self._shape(batch, None))

    def on_gpu(self) -> "GpuBackend":
        if self._driver is None:
            raise OptionError(f"{self.name} needs a CUDA driver port for this", hint="pip install cuda-bindings")
        return self

    @property
    def driver(self) -> Driver:
        """What calls CUDA, where the device loop runs."""
        assert self._driver is not None
        return self._driver

    def close(self) -> None:
        if self._driver is None:
            super().close()
            return
        with self._driver.current():
            self._pool.close()
            alive, self._session = None if self._session is None else weakref.ref(self._session), None
            if self._stream is not None and (alive is None or alive() is None):  # what is bound still runs on it
                self._driver.free_stream(self._stream)
                self._stream = None

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            with suppress(SdeditError):
                self.close()

    def _network(self, shape: tuple[int, int, int, int]) -> DeviceNetwork:
        assert self._stream is not None
        return OrtDeviceNetwork(self._session, shape, self._artifact.extra_inputs, self._stream)

    def _make_loop(self, shape: tuple[int, int, int, int]) -> DeviceLoop:
        return DeviceLoop(self.driver, self._network(shape), shape)


class OrtDeviceNetwork:
    """A session bound to tensors on the GPU, on the stream it was made with. See device_loop.DeviceNetwork.

    Not captured from outside: what it does on the host would not be replayed (tried on an H200: wrong pictures). It has
    a graph of its own, option enable_cuda_graph=1, for models whose every node runs on the GPU; where the batch is
    open, some do not.
    """

    capturable = False

    def __init__(
        self, session: Any, shape: tuple[int, int, int, int], extra: Mapping[str, ExtraInput], stream: int
    ) -> None:
        import onnxruntime

        self.stream: int | None = stream
        self._session, self._shape, self._declared = session, shape, extra
        self._binding = session.io_binding()
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry("gpu_graph_id", str(next(graph_numbers)))

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        self._binding.bind_input("x", "cuda", 0, np.float32, self._shape, x)
        self._binding.bind_input("sigma", "cuda", 0, np.float32, self._shape[:1], sigma)
        self._binding.bind_output("denoised", "cuda", 0, np.float32, self._shape, denoised)

    def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
        for name, value in values.items():
            self._binding.bind_cpu_input(name, np.full(self._shape[0], value, self._declared[name].dtype))

    def enqueue(self, stream: int) -> None:
        assert stream == self.stream
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises its own kinds
            raise NetworkError(
                f"ONNX Runtime failed: {str(error).splitlines()[0]}", hint="check the model with 'sdedit inspect'"
            ) from error

    def close(self) -> None:
        self._binding = self._session = None
