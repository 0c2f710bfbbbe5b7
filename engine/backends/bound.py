"""A network on buffers of the host, as ONNX Runtime and OpenVINO bind it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.errors import NetworkError
from sdedit.loop import Array


class InParts:
    """D(x; σ) of batches whose images are evaluated some at a time, by one that is bound for so many."""

    def __init__(self, bound: "Bound", batch: int) -> None:
        self._bound, (self._rows, *image) = bound, bound.shape
        self._denoised = np.empty((batch, *image), np.float32)

    def __call__(self, x: Array, sigma: Array) -> Array:
        for at in range(0, len(self._denoised), self._rows):
            part = slice(at, at + self._rows)
            self._denoised[part] = self._bound(x[part], sigma[part])
        return self._denoised


class Bound(ABC):
    """D(x; σ) of batches of one shape: x is read where it lies, and nothing is copied but σ. For one thread at a time.

    values: of the extra inputs, checked.
    """

    copies = False  # whether the library copies an array when it is given it, and so wants it anew for every call

    def __init__(self, artifact: Artifact, shape: tuple[int, int, int, int], values: Mapping[str, float]) -> None:
        self._x: Array | None = None
        self._sigma = np.empty(shape[0], np.float32)
        self._denoised = np.empty(shape, np.float32)
        self._extra = {  # kept alive while bound
            name: np.full(shape[0], value, artifact.extra_inputs[name].dtype) for name, value in values.items()
        }
        for name, array in {"sigma": self._sigma, "denoised": self._denoised, **self._extra}.items():
            self._share(name, array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x and of D."""
        return self._denoised.shape

    def __call__(self, x: Array, sigma: Array) -> Array:
        self._sigma[...] = sigma
        if x is not self._x or self.copies:
            if x.shape != self._denoised.shape or x.dtype != np.float32 or not x.flags.c_contiguous:
                raise NetworkError(
                    f"x is {x.dtype} {x.shape}; bound for contiguous float32 {self._denoised.shape}",
                    hint="bind the backend for this batch size",
                )
            self._x = x
            self._share("x", x)
        if self.copies:
            self._share("sigma", self._sigma)
        self._run()
        return self._denoised

    @abstractmethod
    def _share(self, name: str, array: NDArray[Any]) -> None:
        """Let the network have this memory as the input or output of this name."""

    @abstractmethod
    def _run(self) -> None:
        """Evaluate the network. Raises NetworkError."""
