"""ONNX Runtime's CUDA and TensorRT execution providers, inside the device loop where a driver port is installed."""

import contextlib
import ctypes
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from sdedit.artifact import Artifact, ExtraInput
from sdedit.backends import condition_values, require_open
from sdedit.backends.ort import OrtBackend
from sdedit.cache_folder import cache_folder
from sdedit.cuda.conditions import Conditions
from sdedit.cuda.denoiser import DeviceDenoiser
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, open_driver, require_library
from sdedit.cuda.kernels import require_kernels
from sdedit.cuda.pool import LoopPool, Shape
from sdedit.errors import BackendUnavailable, DeviceError, NetworkError, OptionError, SdeditError
from sdedit.executor import DeviceExecutor, Executor, HostExecutor
from sdedit.loop import Denoiser

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

log = logging.getLogger(__name__)
WITH_TF32 = (8, 0)  # compute capability
SHAPES = 4  # whose sessions are kept while no edit uses them
CAPTURING = RLock()  # ONNX Runtime's capture is spoilt by whatever another thread allocates meanwhile
ENGINES = "ort-tensorrt"  # kind of cache_folder, with a folder for each artifact
GRAPH = "enable_cuda_graph"  # the CUDA provider's option: every node must run on the GPU


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


def precisions(artifact: Artifact) -> tuple[str, ...]:
    """What ort-cuda can run it in, its own first: TF32 rounds the factors of float32 products to 10 bits."""
    with suppress(BackendUnavailable):
        if artifact.precision == "fp32" and open_driver().gpu.compute_capability >= WITH_TF32:
            return "fp32", "tf32"
    return (artifact.precision,)


class OrtGpuBackend(OrtBackend):
    """Sessions of one shape each in the device loop, which replay the network as a CUDA graph where ONNX Runtime can.

    Where neither pycuda nor cuda-core's bindings are installed: the host loop, one session, copies at every step.
    """

    def __init__(
        self,
        artifact: Artifact,
        name: str,
        provider_options: Mapping[str, str] | None = None,
        precision: str | None = None,
    ) -> None:
        self._given = dict(provider_options or {})
        if "use_tf32" in self._given:
            raise OptionError("use_tf32 is a precision here", hint="--precision tf32, or fp32, which is without it")
        self._tf32 = precision == "tf32"
        self._graphs = name == "ort-cuda" and GRAPH not in self._given
        self._driver: Driver | None = None
        self._first: OrtDeviceNetwork | None = None  # opened before any loop was: for the first one of its shape
        self._lock = RLock()  # one thread's edits at a time, so that one session a shape is enough
        self._pool, self._closed = LoopPool(least_kept=SHAPES), False
        try:
            self._driver = open_driver()
        except BackendUnavailable as error:
            log.info("%s: tensors are copied at every step: %s; fix: %s", name, error, error.hint)
        else:
            require_kernels(self._driver, name)
        super().__init__(artifact, name, threads=1)
        self.precision = precision or artifact.precision
        self.provider_options = self._given
        if self._driver is not None:
            self.versions = {**self.versions, **self._driver.versions}

    def _open(self) -> Any:
        import onnxruntime

        if os.environ.get("SDEDIT_DEBUG") != "1":
            onnxruntime.set_default_logger_severity(4)
        if self._driver is None:
            return self._open_with({}, {})
        with self._driver.current():
            self._first = self._open_network(self._shape(1, None))  # what is wrong with it shows now
        return None

    def _open_network(self, shape: Shape) -> "OrtDeviceNetwork":
        """A session that takes this shape alone, with a CUDA graph of its own, unless a node of it needs the CPU."""
        with CAPTURING, ExitStack() as on_failure:
            stream = self.driver.make_stream()
            on_failure.callback(self.driver.free_stream, stream)
            session, replays = self._open_for(shape, {"user_compute_stream": str(stream)})
            self._artifact.require_unchanged()
            network = OrtDeviceNetwork(self.driver, session, stream, shape, self._artifact.extra_inputs, replays)
            on_failure.pop_all()
        return network

    def _open_for(self, shape: Shape, stream: Mapping[str, str]) -> tuple[Any, bool]:
        """The session, and whether it has a graph."""
        fixed: dict[str, int] = {}
        for tensor in self._artifact.inputs:
            sides = shape if tensor.name == "x" else shape[:1]
            fixed |= {
                name: side for name, side in zip(tensor.shape or (), sides, strict=False) if isinstance(name, str)
            }
        if self._graphs:
            try:
                return self._open_with({**stream, GRAPH: "1"}, fixed), True
            except BackendUnavailable as error:
                log.info("%s: the network runs node by node: %s", self.name, error)
                self._graphs = False
        return self._open_with(stream, fixed), self._given.get(GRAPH) == "1"

    def _open_with(self, options: Mapping[str, str], fixed: Mapping[str, int]) -> Any:
        """A session with these options of the CUDA provider, whose dimensions of these names are fixed."""
        cuda = ("CUDAExecutionProvider", {"use_tf32": str(int(self._tf32)), **options})  # float32 means float32
        providers = [(cuda[0], cuda[1] | self._given)]
        if self.name == "ort-tensorrt":
            # ONNX Runtime names an engine by the file's name and the graph's shape: other weights would pass for these
            folder = cache_folder(ENGINES) / self._artifact.sha256[:24]
            folder.mkdir(parents=True, exist_ok=True)
            kept = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder), **options}
            providers = [(self.provider, kept | self._given), cuda]  # what TensorRT does not take stays on the GPU

        def fix(settings: Any) -> None:
            for name, side in fixed.items():
                settings.add_free_dimension_override_by_name(name, side)

        try:
            session = self._session_with(providers, change=fix)
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
        if self._driver is None:
            return super().bind(batch, conditions, size)
        shape, values = self._shape(batch, size), condition_values(self._artifact, conditions)
        with self._driver.current(), self._lock:
            denoiser = DeviceDenoiser(self._driver, self._network(shape), shape)
            denoiser.set_conditions(values)
        return denoiser

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
        require_open(self._closed)
        shape, values = self._shape(batch, size), condition_values(self._artifact, conditions)
        with self._lock, self._pool.lease(shape, self._make_loop) as loop:
            loop.network.set_conditions(values, loop.stream)
            yield loop

    def network(self, batch: int) -> DeviceNetwork:
        """The network by itself, for batches of this size. Wants the context current."""
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
            self._closed = True
            super().close()
            return
        with self._driver.current(), self._lock:
            self._closed = True
            self._pool.close()
            first, self._first = self._first, None
            if first is not None:
                first.close()

    def __del__(self) -> None:
        if hasattr(self, "_driver"):
            with suppress(SdeditError):
                self.close()

    def _network(self, shape: Shape) -> DeviceNetwork:
        require_open(self._closed)
        first, self._first = self._first, None
        if first is not None:
            if first.shape == shape:
                return first
            first.close()
        try:
            return self._open_network(shape)
        except BackendUnavailable as error:  # one was opened before: most likely the memory is full
            raise DeviceError(str(error), hint="a smaller --batch, or free the GPU's memory") from error

    def _make_loop(self, shape: Shape) -> DeviceLoop:
        network = self._network(shape)
        with CAPTURING:
            return DeviceLoop(self.driver, network, shape)


class OrtDeviceNetwork:
    """A session of one shape on a stream of its own, bound to tensors on the GPU. See DeviceNetwork.

    ONNX Runtime makes its CUDA graph in the first run, which is here when the tensors are bound, and replays it with
    one launch a call. It keeps graphs and library handles for every thread that calls it, so one thread of the
    network's own does. Captured from outside, its edits were no faster (on an H100), and wrong without that option (on
    an H200): what it does on the host is not replayed.
    """

    capturable = False

    def __init__(
        self, driver: Driver, session: Any, stream: int, shape: Shape, extra: Mapping[str, ExtraInput], replays: bool
    ) -> None:
        import onnxruntime

        self.stream: int | None = stream
        self.shape, self.replays = shape, replays
        self._driver, self._session, self._binding = driver, session, session.io_binding()
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def bind(name: str, address: int, kind: str) -> None:
            self._binding.bind_input(name, "cuda", 0, np.dtype(kind).type, shape[:1], address)

        self._conditions = Conditions(driver, shape[0], extra, bind)
        self._thread = ThreadPoolExecutor(1, "sdedit-ort")

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        self._binding.bind_input("x", "cuda", 0, np.float32, self.shape, x)
        self._binding.bind_input("sigma", "cuda", 0, np.float32, self.shape[:1], sigma)
        self._binding.bind_output("denoised", "cuda", 0, np.float32, self.shape, denoised)
        if self.replays:
            with CAPTURING:
                self._run("a smaller --batch if the GPU's memory is full; else --ep-option enable_cuda_graph=0")

    def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
        self._conditions.set(values, stream)

    def enqueue(self, stream: int) -> None:
        assert stream == self.stream
        self._run("check the model with 'sdedit inspect'")

    def close(self) -> None:
        self._thread.shutdown()
        self._binding = self._session = None
        self._conditions.close()
        if self.stream is not None:
            self._driver.free_stream(self.stream)
            self.stream = None

    def _run(self, hint: str) -> None:
        try:
            self._thread.submit(self._session.run_with_iobinding, self._binding, self._options).result()
        except Exception as error:  # onnxruntime raises its own kinds
            raise NetworkError(f"ONNX Runtime failed: {str(error).splitlines()[0]}", hint=hint) from error
