"""TensorRT and TensorRT-RTX: a plan's network inside the device loop."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any

from sdedit.artifact import Artifact, ExtraInput
from sdedit.backends import USUAL_BATCH, condition_values, require_open
from sdedit.cuda.conditions import Conditions
from sdedit.cuda.denoiser import DeviceDenoiser
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, open_driver
from sdedit.cuda.kernels import require_kernels
from sdedit.cuda.pool import LoopPool
from sdedit.errors import ArtifactError, BackendUnavailable, DeviceError, NetworkError, OptionError, SdeditError
from sdedit.executor import DeviceExecutor, Executor
from sdedit.loop import Denoiser
from sdedit.tensorrt import cache, rtx
from sdedit.tensorrt.installed import Library, open_library
from sdedit.tensorrt.plan import Plan, require_runnable

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

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
        self.usual_batch = self._plan.profile[1] if self._plan else USUAL_BATCH
        gpu = self.driver.gpu
        self.provider = f"{self._library.module.__name__} on {gpu.name}, CUDA {gpu.driver}, {self.driver.name}"
        self.takes_windows = False
        self.versions: Mapping[str, str] = {name: self._library.version, **self.driver.versions}
        self._lock = Lock()  # of the engines
        self._runtime: Any = None
        self._engines: dict[int, Any] = {}
        self._compiled: dict[int, rtx.Kernels] = {}  # of TensorRT-RTX's engines
        self._logger = self._library.logger()
        self._pool, self._closed = LoopPool(), False
        require_kernels(self.driver, name)
        self._engine(self._plan.profile[0] if self._plan else 1)  # what is wrong with it shows now

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        shape, values = self._shape(batch, size), condition_values(self._artifact, conditions)
        with self.driver.current():
            denoiser = DeviceDenoiser(self.driver, self.network(batch), shape)
            denoiser.set_conditions(values)
        return denoiser

    @contextmanager
    def executor(
        self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None
    ) -> Iterator[Executor]:
        self._shape(batch, size)
        with self.driver.current(), self.device_loop(batch, conditions) as loop:
            yield DeviceExecutor(loop)

    @contextmanager
    def device_loop(self, batch: int, conditions: Mapping[str, float]) -> Iterator[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block. Wants the context current."""
        shape, values = self._shape(batch, None), condition_values(self._artifact, conditions)
        with self._pool.lease(shape, self._make_loop) as loop:
            loop.network.set_conditions(values, loop.stream)
            yield loop

    def on_gpu(self) -> "GpuBackend":
        return self

    def close(self) -> None:
        """See Backend; keeps the kernels that TensorRT-RTX has compiled in their file."""
        with self.driver.current():
            self._pool.close()
            for compiled in self._compiled.values():
                compiled.keep()
            self._compiled, self._engines, self._runtime = {}, {}, None  # contexts, then engines, then the runtime
        self._closed = True

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            with suppress(SdeditError):
                self.close()

    def _make_loop(self, shape: tuple[int, int, int, int]) -> DeviceLoop:
        return DeviceLoop(self.driver, self.network(shape[0]), shape)

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

    def network(self, batch: int) -> DeviceNetwork:
        """The network by itself, for batches of this size. Wants the context current."""
        shape = self._shape(batch, None)
        engine = self._engine(batch)
        compiled = self._compiled.get(self._key(batch))
        with self._lock:
            context = engine.create_execution_context(*([] if compiled is None else [compiled.configure(engine)]))
        if context is None:
            raise DeviceError(
                f"{self.name} makes no execution context: {self._logger.last_error() or 'it does not say why'}",
                hint="if the GPU's memory is full: a smaller --batch, or free it ('nvidia-smi' shows who has it)",
            )
        return TensorRtNetwork(self.driver, self._library, context, shape, self._artifact.extra_inputs)

    def _key(self, batch: int) -> int:
        """What its engine is found by: a plan that was given serves every batch size."""
        return 0 if self._plan is not None else batch

    def _engine(self, batch: int) -> Any:
        """The deserialised engine that serves this batch size."""
        require_open(self._closed)
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
        engine = self._runtime.deserialize_cuda_engine(plan.data())
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

    stream: int | None = None
    capturable, replays = True, False

    def __init__(
        self,
        driver: Driver,
        library: Library,
        context: Any,
        shape: tuple[int, int, int, int],
        extra: Mapping[str, ExtraInput],
    ) -> None:
        self._context = context
        inputs: dict[str, tuple[int, ...]] = {"x": shape, "sigma": shape[:1]} | dict.fromkeys(extra, shape[:1])
        for name, dimensions in inputs.items():
            if not context.set_input_shape(name, dimensions):
                raise DeviceError(
                    f"{library.name}: the plan does not take {name} of shape {dimensions}",
                    hint="'sdedit inspect MODEL.plan' shows its profile; 'sdedit build --batch' makes another",
                )
        self._conditions = Conditions(
            driver, shape[0], extra, lambda name, address, _: self._set_address(name, address)
        )

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        for name, address in (("x", x), ("sigma", sigma), ("denoised", denoised)):
            self._set_address(name, address)

    def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
        self._conditions.set(values, stream)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise NetworkError("TensorRT could not enqueue the network", hint="'sdedit doctor' says what works")

    def close(self) -> None:
        self._context = None
        self._conditions.close()

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise DeviceError(f"TensorRT does not take an address for {name}", hint="'sdedit build' the plan again")
