"""ONNX Runtime on the CPU, and what its GPU backends share with it."""

import ctypes
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.backends import USUAL_BATCH, condition_values, ort_cache, require_open
from sdedit.backends.bound import Bound, InParts
from sdedit.backends.ort_graph import Change, open_fused
from sdedit.cpu import usable_cores
from sdedit.errors import ArtifactError, BackendUnavailable, NetworkError, SdeditError
from sdedit.executor import HostExecutor, Lease
from sdedit.loop import Denoiser
from sdedit.operators import shipped

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend

PROVIDERS = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
MOST_THREADS = 256
VECTOR = 4  # float32 values that ONNX Runtime's elementwise operators take at once
Providers = list[tuple[str, dict[str, str]]]
GPU_HINT = "pip uninstall onnxruntime, then pip install 'sdedit-engine[cuda]' (the two share a folder)"


def probe(name: str) -> None:
    """Raise BackendUnavailable unless this ONNX Runtime has the provider that `name` needs, and its libraries load."""
    provider = PROVIDERS[name]
    try:
        import onnxruntime
    except ImportError as error:
        extra = "cpu" if name == "ort-cpu" else "cuda"
        raise BackendUnavailable(
            f"{name}: onnxruntime cannot be imported: {error}", hint=f"pip install 'sdedit-engine[{extra}]'"
        ) from error
    if provider not in onnxruntime.get_available_providers():
        raise BackendUnavailable(f"{name}: this onnxruntime has no {provider}", hint=GPU_HINT)
    if name != "ort-cpu":
        from sdedit.backends import ort_gpu

        ort_gpu.require_libraries(name)


def precisions(artifact: Artifact) -> tuple[str, ...]:
    """What ort-cpu can run this artifact in here, its own first: a float32 one also in a half precision."""
    if artifact.precision == "fp32" and ort_cache.takes(artifact) and (half := shipped.half()):
        return "fp32", half
    return (artifact.precision,)


def give_back_memory() -> None:
    """Let the system have what was freed. glibc keeps it: 950 MB after a session of 114 million weights."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def model_source(artifact: Artifact) -> str | bytes:
    """What ONNX Runtime and OpenVINO open: they take names that are text; a file with another name goes in as bytes."""
    try:
        str(artifact.path).encode()
    except UnicodeEncodeError:
        if artifact.external:
            raise ArtifactError(
                f"{artifact.path}: has external data and a name that is not text", hint="rename the file's folder"
            ) from None
        return artifact.path.read_bytes()
    return str(artifact.path)


class OrtBackend:
    """An ONNX Runtime session. `threads`: for the CPU provider; None is every core this process may use.

    precision: one of `precisions`; None is the artifact's own. keeps_graph: whether the graph cache may be used.
    """

    def __init__(
        self,
        artifact: Artifact,
        name: str,
        threads: int | None,
        precision: str | None = None,
        *,
        keeps_graph: bool = True,
    ) -> None:
        import onnxruntime

        self.name, self.provider = name, PROVIDERS[name]
        self.precision, self.usual_batch = precision or artifact.precision, USUAL_BATCH
        self.threads = min(usable_cores(), MOST_THREADS) if threads is None else threads
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self.takes_windows = name == "ort-cpu"
        self.provider_options: Mapping[str, str] = {}
        self._artifact, self._keeps_graph = artifact, keeps_graph
        self._session: Any = None
        try:
            self._session = self._open()
        except SdeditError:
            raise
        except Exception as error:  # onnxruntime raises its own kinds, and RuntimeError
            raise ArtifactError(
                f"{artifact.path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}",
                hint="write it again; opset 18 to 22 is safe",
            ) from error

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        require_open(self._session is None)
        rows = _rows_at_once(batch) if self.name == "ort-cpu" else batch
        shape, values = self._shape(rows, size), condition_values(self._artifact, conditions)
        bound = _Bound(self._session, self.name != "ort-cpu", self._artifact, shape, values)
        return bound if rows == batch else InParts(bound, batch)

    def executor(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Lease:
        return nullcontext(HostExecutor(self.bind(batch, conditions, size), draws_ahead=self.threads > 1))

    def write_graph(self, folder: Path) -> None:
        """Make `folder`, with the graph (and weights) that a session with this package's operators runs.

        Raises OSError, ArtifactError where this one has none, or ONNX Runtime refuses it.
        """
        made = None
        try:
            if "operators" in self.versions:
                with tempfile.TemporaryDirectory() as scratch:
                    made = open_fused(self._artifact, self._open_file, Path(scratch), folder, half=self._half)
        except (OSError, SdeditError):
            raise
        except Exception as error:  # onnxruntime raises its own kinds
            raise ArtifactError(
                f"{self._artifact.path}: ONNX Runtime: {str(error).splitlines()[0]}", hint="see 'sdedit doctor'"
            ) from error
        if made is None:
            raise ArtifactError(
                f"{self._artifact.path}: ort-cpu runs it here without this package's operators",
                hint="see 'sdedit doctor'; a host that opens the model itself is as fast",
            )

    def on_gpu(self) -> "GpuBackend | None":
        return None

    def close(self) -> None:
        self._session = None
        give_back_memory()

    @property
    def _half(self) -> str | None:
        return self.precision if self.name == "ort-cpu" and self.precision != self._artifact.precision else None

    def _open(self) -> Any:
        """The session. Raises whatever ONNX Runtime raises."""
        session, fused = ort_cache.open_session(
            self._artifact, self._open_file, half=self._half, kept=self._keeps_graph
        )
        if session is None:
            self._open_file(None, None)  # for its error, if it is the artifact's
            raise BackendUnavailable(
                f"{self._artifact.path}: ort-cpu finds no way to run it in {self.precision} that agrees with float32",
                hint="leave --precision out",
            )
        if fused:
            self.versions = {**self.versions, "operators": shipped.version()}
        return session

    def _open_file(self, source: str | None, change: Change | None) -> Any:
        return self._session_with([(self.provider, {})], source=source, change=change)

    def _session_with(self, providers: Providers, *, source: str | None = None, change: Change | None = None) -> Any:
        """source: a file; None is the artifact. change: sets further options."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if change is not None:
            change(options)
        return onnxruntime.InferenceSession(
            source or model_source(self._artifact), options, providers=providers, enable_fallback=0
        )

    def _shape(self, batch: int, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
        width, height = self._artifact.frame(size)
        return batch, self._artifact.channels, height, width


def _rows_at_once(batch: int) -> int:
    """As many as come out alike: of numbers one an image, as in log σ, ONNX Runtime takes four together, and what is
    left over one by one, to other last bits.
    """
    if batch <= VECTOR or batch % VECTOR == 0:
        return batch
    return next(rows for rows in range(VECTOR - 1, 0, -1) if batch % rows == 0)


class _Bound(Bound):
    def __init__(self, session: Any, copies: bool, *given: Any) -> None:
        self.copies, self._session, self._binding = copies, session, session.io_binding()
        super().__init__(*given)

    def _share(self, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_output if name == "denoised" else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises its own kinds
            raise NetworkError(
                f"ONNX Runtime failed: {str(error).splitlines()[0]}", hint="check the model with 'sdedit inspect'"
            ) from error
