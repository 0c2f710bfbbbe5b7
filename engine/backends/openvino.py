"""OpenVINO on the CPU: a compiled network for every shape, on our own buffers."""

from collections.abc import Mapping
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.backends import USUAL_BATCH, condition_values, require_open
from sdedit.backends.bound import Bound
from sdedit.backends.ort import MOST_THREADS, give_back_memory, model_source
from sdedit.cpu import usable_cores
from sdedit.errors import ArtifactError, BackendUnavailable, NetworkError
from sdedit.executor import HostExecutor, Lease
from sdedit.loop import Denoiser

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

NATIVE = {"fp32": "f32", "int8": "f32", "fp16": "dynamic", "bf16": "dynamic"}  # "dynamic": as the graph's types say
REDUCED = {"bf16": "BF16", "fp16": "FP16"}  # what a float32 graph can be run in -> the capability that takes
HINTS = {"bf16": "bf16", "fp16": "f16"}
SHAPES = 4  # whose compiled networks, each with its own weights, are kept while no edit uses them


def probe(name: str) -> None:
    """Raise BackendUnavailable unless OpenVINO can be imported and finds the CPU."""
    try:
        import openvino

        devices = openvino.Core().available_devices
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"{name}: openvino cannot be imported: {error}", hint="pip install 'sdedit-engine[openvino]'"
        ) from error
    if "CPU" not in devices:
        raise BackendUnavailable(
            f"{name}: this openvino has no CPU device", hint="pip install --force-reinstall 'sdedit-engine[openvino]'"
        )


def precisions(artifact: Artifact) -> tuple[str, ...]:
    """What this artifact can be run in on this CPU, its own first: a float32 one also in half precisions."""
    import openvino

    if artifact.precision != "fp32":
        return (artifact.precision,)
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "fp32", *(precision for precision, needed in REDUCED.items() if needed in capabilities)


class OpenVinoBackend:
    """An artifact, compiled for each shape that is bound. `threads`: None is every core this process may use.

    precision: one of `precisions`; None is the artifact's own, whatever OpenVINO would choose by itself (which is
    bfloat16 where the CPU has it).
    """

    name = "openvino"
    provider = "OpenVINO CPU"
    takes_windows = True

    def __init__(self, artifact: Artifact, threads: int | None, precision: str | None = None) -> None:
        import openvino

        self.precision, self.usual_batch = precision or artifact.precision, USUAL_BATCH
        self.threads = min(usable_cores(), MOST_THREADS) if threads is None else threads
        self.versions: Mapping[str, str] = {"openvino": openvino.__version__.partition("-")[0]}
        self.provider_options: Mapping[str, str] = {}
        self._artifact = artifact
        self._core = openvino.Core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self.threads),
            "ENABLE_CPU_PINNING": "NO",  # two editors would be pinned to the same cores; one gains nothing by it
            "INFERENCE_PRECISION_HINT": (
                NATIVE.get(self.precision, "f32") if self.precision == artifact.precision else HINTS[self.precision]
            ),
        }
        self._lock = Lock()  # of what is compiled
        self._closed = False
        self._compiled: dict[tuple[int, int, int, int], Any] = {}
        self._network((1, artifact.channels, artifact.height, artifact.width))  # what is wrong with it shows now

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        width, height = self._artifact.frame(size)
        shape, values = (batch, self._artifact.channels, height, width), condition_values(self._artifact, conditions)
        return _Bound(self._network(shape).create_infer_request(), self._artifact, shape, values)

    def executor(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Lease:
        return nullcontext(HostExecutor(self.bind(batch, conditions, size), draws_ahead=self.threads > 1))

    def on_gpu(self) -> "GpuBackend | None":
        return None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._compiled.clear()
        give_back_memory()

    def _network(self, shape: tuple[int, int, int, int]) -> Any:
        """The network compiled for this shape. Shapes that do not change let OpenVINO plan its memory once."""
        with self._lock:
            require_open(self._closed)
            if (compiled := self._compiled.pop(shape, None)) is None:
                try:
                    model = self._core.read_model(model_source(self._artifact))
                    model.reshape({"x": shape} | dict.fromkeys(["sigma", *self._artifact.extra_inputs], shape[:1]))
                    compiled = self._core.compile_model(model, "CPU", self._settings)
                except RuntimeError as error:
                    raise ArtifactError(
                        f"{self._artifact.path}: OpenVINO cannot load it: {_reason(error)}",
                        hint="write it again, opset 18 to 22 is safe; or use --backend ort-cpu",
                    ) from error
                self._artifact.require_unchanged()
            self._compiled[shape] = compiled  # the last one used is the last to go
            while len(self._compiled) > SHAPES:
                del self._compiled[next(iter(self._compiled))]
            return compiled


class _Bound(Bound):
    def __init__(self, request: Any, *given: Any) -> None:
        self._request = request
        super().__init__(*given)

    def _share(self, name: str, array: NDArray[Any]) -> None:
        import openvino

        try:
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        except RuntimeError as error:
            raise NetworkError(
                f"OpenVINO does not take {array.dtype} {array.shape} for {name}: {_reason(error)}",
                hint="check the model with 'sdedit inspect'",
            ) from error

    def _run(self) -> None:
        try:
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise NetworkError(
                f"OpenVINO failed: {_reason(error)}", hint="check the model with 'sdedit inspect'"
            ) from error


def _reason(error: Exception) -> str:
    """The line that says what is wrong, of a message that begins with places in OpenVINO's own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[0]
