"""TensorRT and TensorRT-RTX: a plan's network inside the device loop."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from sdedit.artifact import Artifact
from sdedit.backends import condition_values
from sdedit.cuda.denoiser import DeviceDenoiser
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, open_driver
from sdedit.errors import ArtifactError, BackendUnavailable, DeviceError, NetworkError, OptionError
from sdedit.executor import DeviceExecutor, Executor
from sdedit.loop import Denoiser
from sdedit.tensorrt import cache, rtx
from sdedit.tensorrt.library import Library, open_library
from sdedit.tensorrt.plan import Plan, require_runnable

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

MOST_KEPT = 4  # bound loops that wait for the next edit of their shape

log = logging.getLogger(__name__)


def probe(name: str) -> None:
    """Raise BackendUnavailable unless the library and a GPU are there. The driver comes first: without one,
    TensorRT itself may crash.
    """
    try:
        open_driver()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{name}: {error}", hint=error.hint) from error
    open_library(name)


class TensorRtBackend:
    """An artifact whose plans are found in the cache or built when a batch size is first asked for; or one plan."""

    threads = 1
    provider_options: Mapping[str, str] = {}

    def __init__(self, model: Artifact | Plan, name: str) -> None:
        self.name = name
        self.driver = open_driver()
        self._library = open_library(name)
        self._plan = model if isinstance(model, Plan) else None
        self._artifact = model.artifact if isinstance(model, Plan) else model
        self.precision = self._artifact.precision
        gpu = self.driver.gpu
        self.provider = f"{self._library.module.__name__} on {gpu.name}, CUDA {gpu.driver}, {self.driver.name}"
        self.versions: Mapping[str, str] = {name: self._library.version, **self.driver.versions}
        self._lock = Lock()
        self._logger = self._library.logger()
        self._runtime: Any = None
        self._engines: dict[int, Any] = {}
        self._compiled: dict[int, rtx.Kernels] = {}  # of TensorRT-RTX's engines
        self._waiting: list[tuple[tuple[Any, ...], DeviceLoop]] = []
        self._engine(self._plan.profile[0] if self._plan else 1)  # what is wrong with it shows now

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        shape = self._shape(batch, size)
        with self.driver.current():
            network = self.network(shape[0], conditions)
        return DeviceDenoiser(self.driver, network, shape)

    @contextmanager
    def executor(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> Iterator[Executor]:
        self._shape(batch, size)
        with self.driver.current(), self.device_loop(batch, conditions, None) as loop:
            yield DeviceExecutor(loop)

    @contextmanager
    def device_loop(self, batch: int, conditions: Mapping[str, float], stream: int | None) -> Iterator[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block. Wants the context current."""
        shape, values = self._shape(batch, None), condition_values(self._artifact, conditions)
        key = (shape, stream, *sorted(values.items()))
        loop = self._take(key) or DeviceLoop(self.driver, self.network(shape[0], conditions), shape, stream=stream)
        try:
            yield loop
        except BaseException:  # what failed is not used again
            with suppress(DeviceError):
                loop.close()
            raise
        self._keep(key, loop)

    def on_gpu(self) -> "GpuBackend":
        return self

    def close(self) -> None:
        """Free what waits for another edit."""
        with self._lock:
            loops, self._waiting = [loop for _, loop in self._waiting], []
        with self.driver.current():
            for loop in loops:
                loop.close()

    def __del__(self) -> None:
        if hasattr(self, "_waiting"):
            with suppress(DeviceError):
                self.close()

    def _take(self, key: tuple[Any, ...]) -> DeviceLoop | None:
        with self._lock:
            for entry in self._waiting:
                if entry[0] == key:
                    self._waiting.remove(entry)
                    return entry[1]
        return None

    def _keep(self, key: tuple[Any, ...], loop: DeviceLoop) -> None:
        with self._lock:
            for compiled in self._compiled.values():
                compiled.keep()
            self._waiting.append((key, loop))
            oldest = self._waiting.pop(0)[1] if len(self._waiting) > MOST_KEPT else None
        if oldest is not None:
            oldest.close()

    def _shape(self, batch: int, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
        width, height = self._artifact.frame(size)
        if (width, height) != (self._artifact.width, self._artifact.height):
            raise OptionError(
                f"size is {width}x{height}; plans are built for {self._artifact.width}x{self._artifact.height}",
                hint="export the model at this size, or use --backend ort-cuda",
            )
        if self._plan is not None:
            smallest, _, largest = self._plan.profile
            if not smallest <= batch <= largest:
                raise OptionError(
                    f"batch is {batch}; {self._plan.path} was built for {smallest} to {largest}",
                    hint=f"sdedit build --batch {min(batch, smallest)}:{batch}:{max(batch, largest)}",
                )
        return batch, self._artifact.channels, height, width

    def network(self, batch: int, conditions: Mapping[str, float]) -> DeviceNetwork:
        """The network by itself, for batches of this size. Wants the context current."""
        shape, values = self._shape(batch, None), condition_values(self._artifact, conditions)
        extra = {
            name: np.full(shape[0], value, self._artifact.extra_inputs[name].dtype) for name, value in values.items()
        }
        engine = self._engine(shape[0])
        with self._lock:
            compiled = self._compiled.get(self._key(batch))
            context = engine.create_execution_context(*([] if compiled is None else [compiled.configure(engine)]))
        return TensorRtNetwork(self.driver, self._library, context, shape, extra)

    def _key(self, batch: int) -> int:
        """What its engine is found by: a plan that was given serves every batch size."""
        return 0 if self._plan is not None else batch

    def _engine(self, batch: int) -> Any:
        """The deserialised engine that serves this batch size."""
        with self._lock:
            key = self._key(batch)
            if key not in self._engines:
                plan = self._plan or cache.find_or_build(
                    self._artifact, self._library, gpu=self.driver.gpu, batch=(batch,) * 3, say=log.info
                )
                require_runnable(plan, self._library, self.driver.gpu.compute_capability)
                with self.driver.current():
                    self._engines[key] = self._deserialize(plan)
                if self._library.ahead_of_time:
                    self._compiled[key] = rtx.Kernels(self._library, plan, self.driver.gpu)
            return self._engines[key]

    def _deserialize(self, plan: Plan) -> Any:
        if self._runtime is None:
            self._runtime = self._library.module.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(plan.path.read_bytes())
        if engine is None:
            raise ArtifactError(
                f"{plan.path}: {self.name} cannot load it: {self._logger.last_error() or 'no reason given'}",
                hint="sdedit build it again on this machine",
            )
        require_tensors(self._library, engine, plan)
        return engine


def require_tensors(library: Library, engine: Any, plan: Plan) -> None:
    """Raise ArtifactError unless the engine's inputs and outputs are the artifact's."""
    modes = {library.module.TensorIOMode.INPUT: "input", library.module.TensorIOMode.OUTPUT: "output"}
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    found = {name: modes[engine.get_tensor_mode(name)] for name in names}
    wanted = {"x": "input", "sigma": "input", "denoised": "output"}
    wanted |= dict.fromkeys(plan.artifact.extra_inputs, "input")
    if found != wanted:
        raise ArtifactError(
            f"{plan.path}: its tensors are {', '.join(f'{n} ({m})' for n, m in found.items())}; "
            f"wanted {', '.join(f'{n} ({m})' for n, m in wanted.items())}",
            hint="sdedit build it again from the .onnx file",
        )
    for name in ("x", "sigma", "denoised"):
        if engine.get_tensor_dtype(name) != library.module.DataType.FLOAT:
            raise ArtifactError(
                f"{plan.path}: {name} is {engine.get_tensor_dtype(name)}; wanted float32",
                hint="sdedit build it again from the .onnx file",
            )
    artifact = plan.artifact
    shape = tuple(engine.get_tensor_shape("x"))[1:]
    if shape != (artifact.channels, artifact.height, artifact.width):
        raise ArtifactError(
            f"{plan.path}: x has {shape} after the batch; wanted "
            f"{(artifact.channels, artifact.height, artifact.width)}",
            hint="sdedit build it again from the .onnx file",
        )


class TensorRtNetwork:
    """One execution context with its own activations. See sdedit.cuda.device_loop.DeviceNetwork."""

    capturable = True

    def __init__(
        self,
        driver: Driver,
        library: Library,
        context: Any,
        shape: tuple[int, int, int, int],
        extra: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        self._driver = driver
        self._context = context
        if self._context is None:
            raise DeviceError(
                f"{library.name}: no execution context: its activations do not fit into the GPU's memory",
                hint="use a smaller --batch, or free the GPU",
            )
        self._inputs = {"x": shape, "sigma": shape[:1]} | {name: values.shape for name, values in extra.items()}
        self._extra: list[int] = []
        for name, dimensions in self._inputs.items():
            if not self._context.set_input_shape(name, dimensions):
                raise DeviceError(
                    f"{library.name}: the plan does not take {name} of shape {dimensions}",
                    hint="'sdedit inspect MODEL.plan' shows its profile; 'sdedit build --batch' makes another",
                )
        for name, values in extra.items():
            self._set_address(name, self._upload(values))

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        for name, address in (("x", x), ("sigma", sigma), ("denoised", denoised)):
            self._set_address(name, address)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise NetworkError("TensorRT could not enqueue the network", hint="'sdedit doctor' says what works")

    def close(self) -> None:
        self._context = None
        for pointer in self._extra:
            self._driver.free(pointer)
        self._extra = []

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise DeviceError(f"TensorRT does not take an address for {name}", hint="'sdedit build' the plan again")

    def _upload(self, values: "np.ndarray[Any, Any]") -> int:
        pointer = self._driver.allocate(values.nbytes)
        self._extra.append(pointer)
        pinned = self._driver.allocate_pinned(values.nbytes)
        pinned[:] = values.view(np.uint8)
        stream = self._driver.make_stream()
        self._driver.upload(pointer, pinned, stream)
        self._driver.synchronize(stream)
        self._driver.free_stream(stream)
        self._driver.free_pinned(pinned)
        return pointer
