"""ONNX Runtime: on the CPU, and through its CUDA and TensorRT execution providers."""

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.errors import ArtifactError, BackendUnavailable, NetworkError, OptionError
from sdedit.loop import Array, Denoiser

PROVIDERS = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
PROVIDER_OPTIONS = {"ort-cuda": {"use_tf32": "0"}}  # float32 means float32
MOST_THREADS = 256
GPU_HINT = "pip uninstall onnxruntime, then pip install 'sdedit-engine[cuda]' (the two share a folder)"


def probe(name: str) -> None:
    """Raise BackendUnavailable unless this ONNX Runtime has the provider that `name` needs."""
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


def usable_cores() -> int:
    """The cores this process may run on, which a cpuset or taskset may have made fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _source(artifact: Artifact) -> str | bytes:
    """ONNX Runtime takes names that are text; a file with another name goes in as bytes."""
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
    """An ONNX Runtime session. `threads`: for the CPU provider; None is every core this process may use."""

    def __init__(self, artifact: Artifact, name: str, threads: int | None) -> None:
        import onnxruntime

        provider = PROVIDERS[name]
        self.name, self.provider = name, provider
        self.precision = artifact.precision
        self.threads = min(usable_cores(), MOST_THREADS) if threads is None else threads
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self._artifact = artifact
        if name != "ort-cpu" and hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
                onnxruntime.preload_dlls(directory="")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            chosen = [(provider, PROVIDER_OPTIONS.get(name, {}))]
            self._session = onnxruntime.InferenceSession(_source(artifact), options, providers=chosen)
        except Exception as error:  # onnxruntime raises its own kinds, and RuntimeError
            reason = str(error).splitlines()[0]
            if name == "ort-cpu":
                raise ArtifactError(
                    f"{artifact.path}: ONNX Runtime cannot load it: {reason}",
                    hint="write it again; opset 18 to 22 is safe",
                ) from error
            raise BackendUnavailable(f"{name}: {reason}", hint=GPU_HINT) from error
        if self._session.get_providers()[0] != provider:
            raise BackendUnavailable(f"{name}: {provider} did not come up; its libraries are missing", hint=GPU_HINT)

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        artifact = self._artifact
        width, height = artifact.frame(size)
        extra = {}
        for name, declared in artifact.extra_inputs.items():
            if name not in conditions:
                raise OptionError(f"the model needs a value for its input {name}", hint=f"--set {name}=0")
            extra[name] = np.full(batch, declared.checked(name, conditions[name]), declared.dtype)
        if unknown := set(conditions) - set(extra):
            names = ", ".join(sorted(unknown))
            known = f"it takes {', '.join(extra)}" if extra else "this model takes none"
            raise OptionError(f"the model has no input {names} to set", hint=known)
        shape = batch, artifact.channels, height, width
        return _Bound(self._session, shape, extra, shares_memory=self.name == "ort-cpu")


class _Bound:
    """A session with preallocated buffers. On the CPU x is bound in place and nothing is copied but σ; a GPU
    session copies an input when it is bound, so there inputs are bound anew for every call.
    """

    def __init__(
        self, session: Any, shape: tuple[int, int, int, int], extra: Mapping[str, NDArray[Any]], *, shares_memory: bool
    ) -> None:
        self._shares_memory = shares_memory
        self._run, self._binding = session.run_with_iobinding, session.io_binding()
        self._x: Array | None = None
        self._sigma = np.empty(shape[0], np.float32)
        self._denoised = np.empty(shape, np.float32)
        self._extra = extra  # kept alive while bound
        self._bind("input", "sigma", self._sigma)
        self._bind("output", "denoised", self._denoised)
        for name, values in extra.items():
            self._bind("input", name, values)

    def __call__(self, x: Array, sigma: Array) -> Array:
        self._sigma[...] = sigma
        if x is not self._x or not self._shares_memory:
            if x.shape != self._denoised.shape or x.dtype != np.float32 or not x.flags.c_contiguous:
                raise NetworkError(
                    f"x is {x.dtype} {x.shape}; bound for contiguous float32 {self._denoised.shape}",
                    hint="bind the backend for this batch size",
                )
            self._x = x
            self._bind("input", "x", x)
        if not self._shares_memory:
            self._bind("input", "sigma", self._sigma)
        try:
            self._run(self._binding)
        except Exception as error:  # onnxruntime raises its own kinds
            raise NetworkError(
                f"ONNX Runtime failed: {str(error).splitlines()[0]}", hint="check the model with 'sdedit inspect'"
            ) from error
        return self._denoised

    def _bind(self, side: str, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_input if side == "input" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
