"""What executes the denoiser. A backend holds one loaded artifact and binds it for each edit."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from sdedit.artifact import Artifact
from sdedit.errors import ArtifactError, BackendUnavailable, ClosedError, OptionError
from sdedit.executor import Lease
from sdedit.loop import Denoiser

if TYPE_CHECKING:
    from sdedit.cuda.tensor_edit import GpuBackend
    from sdedit.tensorrt.plan import Plan

ORT = ("ort-cpu", "ort-cuda", "ort-tensorrt")
TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> the library's module
BACKENDS = (*ORT, "openvino", *TENSORRT)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
PRECISION_HINTS = {
    "tf32": "leave --precision out; tf32 is for fp32 models with --backend ort-cuda, on an NVIDIA GPU from Ampere on"
}  # of those that no model has
HALF_NEEDS = {"fp16": "AVX512-FP16", "bf16": "AVX512-BF16 without AVX512-FP16"}  # on ort-cpu
USUAL_BATCH = 8  # within two percent of the fastest for small networks, and no burden for large ones
CPU = ("ort-cpu", "openvino")
GPU = ("tensorrt", "tensorrt-rtx", "ort-cuda")  # of those, best first
AUTO_ORDER = (*GPU, *CPU)  # best first; all keep the artifact's own precision


class Backend(Protocol):
    """One artifact, loaded. Safe to share between threads: every edit has an executor of its own."""

    name: str
    provider: str  # what executes, in its library's own words
    precision: str  # that it executes in
    threads: int  # of the network on a CPU; 1 on a GPU
    usual_batch: int  # images in a network call, for a folder of them whose caller does not say
    provider_options: Mapping[str, str]  # what the caller told ONNX Runtime's provider
    versions: Mapping[str, str]  # of the libraries that execute
    takes_windows: bool  # whether its executors take windows of a frame (`Batch.windows`)

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        """The network with its own buffers, for batches of this size. conditions: extra input -> value.

        size: width and height, where the model takes any; None is its own. Raises OptionError.
        """
        ...

    def executor(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Lease:
        """What runs edits in batches of this size, for the length of a `with` block. Arguments as for `bind`."""
        ...

    def on_gpu(self) -> "GpuBackend | None":
        """Itself, if its loop runs on the GPU; None for the host loop."""
        ...

    def close(self) -> None:
        """Free session, plans and device memory; nothing is executing. What is bound holds them as long as it lives.

        `bind` and `executor` raise ClosedError from then on. May be called again.
        """
        ...


def open_backend(
    name: str,
    model: "Artifact | Plan",
    threads: int | None,
    provider_options: Mapping[str, str] | None = None,
    precision: str | None = None,
) -> Backend:
    """Open a model on the backend called `name`, or the best that works for "auto".

    precision: what it executes in; None is the model's own. Raises BackendUnavailable, OptionError for a name or a
    precision it does not know; never falls back from a backend that was named.
    """
    if provider_options and name not in ORT:
        raise OptionError(
            f"provider options are ONNX Runtime's; the backend is {name}", hint="name ort-cuda or ort-tensorrt"
        )
    if name != "auto":
        return _open(name, model, threads, provider_options, precision)
    candidates = _candidates(model)
    failures: dict[str, BackendUnavailable | ArtifactError] = {}
    for candidate in candidates:
        try:
            return _open(candidate, model, threads, provider_options, precision)
        except (BackendUnavailable, ArtifactError) as error:
            if candidate in CPU and isinstance(error, ArtifactError):
                raise  # what one of them cannot read is wrong
            failures[candidate] = error
    raise failures.get(CPU[0]) or failures[candidates[-1]]  # what works everywhere, once it is installed


def precisions(name: str, model: "Artifact | Plan") -> tuple[str, ...]:
    """What a backend that works can run this model in, the model's own first."""
    if name == "openvino" and isinstance(model, Artifact):
        from sdedit.backends import openvino

        return openvino.precisions(model)
    if name == "ort-cpu" and isinstance(model, Artifact):
        from sdedit.backends import ort

        return ort.precisions(model)
    if name == "ort-cuda" and isinstance(model, Artifact):
        from sdedit.backends import ort_gpu

        return ort_gpu.precisions(model)
    return ((model if isinstance(model, Artifact) else model.artifact).precision,)


def _candidates(model: "Artifact | Plan") -> Sequence[str]:
    """What auto tries, best first: without NVIDIA's driver nothing that needs it, which saves loading it."""
    from sdedit.cuda.driver import require_library

    if not isinstance(model, Artifact):
        return (model.built_by,)
    cpu = CPU[::-1] if model.precision == "bf16" else CPU  # which ONNX Runtime does not run on a CPU
    try:
        require_library()
    except BackendUnavailable:
        return cpu
    return (*GPU, *cpu)


def _open(
    name: str,
    model: "Artifact | Plan",
    threads: int | None,
    provider_options: Mapping[str, str] | None,
    precision: str | None,
) -> Backend:
    probe(name)
    if name not in TENSORRT and not isinstance(model, Artifact):
        raise OptionError(
            f"{model.path}: a plan for {model.built_by} does not run on {name}", hint="load the .onnx file it came from"
        )
    if precision is not None and precision not in (can := precisions(name, model)):
        require_known(precision)
        own = model if isinstance(model, Artifact) else model.artifact
        hint = "name a model of that precision, or leave --precision out; --backend openvino runs fp32 models in bf16 "
        hint += "on a CPU that has it"
        if (name, own.precision) == ("ort-cpu", "fp32") and precision in HALF_NEEDS:
            hint = f"leave --precision out; {precision} takes {HALF_NEEDS[precision]}, this package's operators (see "
            hint += "'sdedit doctor') and a model of 1 MB to 2 GB; on other CPUs --backend openvino may have it"
        raise BackendUnavailable(
            f"precision {precision} was asked for; {own.name} is {own.precision}, and {name} runs it in "
            f"{' or '.join(can)} alone",
            hint=PRECISION_HINTS.get(precision, hint),
        )
    if name in TENSORRT:
        from sdedit.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(model, name)
    assert isinstance(model, Artifact)
    if name == "ort-cpu":
        from sdedit.backends.ort import OrtBackend

        if provider_options:
            raise OptionError("ort-cpu takes no provider options", hint="name ort-cuda or ort-tensorrt")
        return OrtBackend(model, name, threads, precision)
    if name == "openvino":
        from sdedit.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model, threads, precision)
    from sdedit.backends.ort_gpu import OrtGpuBackend

    return OrtGpuBackend(model, name, provider_options, precision)


def require_known(precision: str) -> None:
    """Raise OptionError for a precision that no backend has."""
    if precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}", hint=f"choose one of {', '.join(PRECISIONS)}")


def probe(name: str) -> None:
    """Raise BackendUnavailable, with the cause and the fix, unless the backend can be tried here."""
    if name in TENSORRT:
        if find_spec(TENSORRT[name]) is None:
            raise BackendUnavailable(
                f"{name}: {TENSORRT[name]} is not installed", hint=f"pip install 'sdedit-engine[{name}]'"
            )
        from sdedit.backends import tensorrt

        tensorrt.probe(name)
    elif name in ORT:
        from sdedit.backends import ort

        ort.probe(name)
    elif name == "openvino":
        from sdedit.backends import openvino

        openvino.probe(name)
    else:
        raise OptionError(f"unknown backend {name!r}", hint=f"choose one of auto, {', '.join(BACKENDS)}")


def require_open(closed: bool) -> None:
    """Raise ClosedError for a backend that was closed."""
    if closed:
        raise ClosedError("the backend is closed", hint="open the model again: sdedit.load")


def condition_values(artifact: Artifact, conditions: Mapping[str, float]) -> dict[str, float]:
    """A checked value for each of the model's extra inputs. Raises OptionError for one too few or too many."""
    values = {}
    for name, declared in artifact.extra_inputs.items():
        if name not in conditions:
            raise OptionError(f"the model needs a value for its input {name}", hint=f"--set {name}=0")
        values[name] = declared.checked(name, conditions[name])
    if unknown := set(conditions) - set(values):
        known = f"it takes {', '.join(values)}" if values else "this model takes none"
        raise OptionError(f"the model has no input {', '.join(sorted(unknown))} to set", hint=known)
    return values
