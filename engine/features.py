"""Feature networks of the user's own, such as FID's Inception: pictures in, one row of features a picture out."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from sdedit.errors import ArtifactError, BackendUnavailable, OptionError

Array = NDArray[np.float32]
Run = Callable[[Array], Array]  # (B, 3, H, W) -> (B, F)

BATCH = 16


@dataclass(frozen=True)
class Convention:
    """What a feature network is fed. The default is that of FID's Inception: 299 pixels, (pixel − 128) / 128."""

    size: int | None = 299  # both sides are scaled to it, bilinearly; None leaves pictures as they are
    low: float = -1.0  # what pixel 0 becomes
    high: float = 0.9921875  # and what 255 becomes

    def __str__(self) -> str:
        return f"{self.size or 'own'}:{self.low:g}:{self.high!r}"


class FeatureNetwork:
    """Called with uint8 pictures (N, H, W, 3); returns float32 (N, F). Made by `open_features`."""

    def __init__(self, path: Path, convention: Convention, run: Run) -> None:
        self.name, self.convention, self._run = path.name, convention, run
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Raises OptionError (not pictures), ArtifactError (the network cannot run them, or returns no rows)."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
            raise OptionError(
                f"pictures are {pixels.dtype} {pixels.shape}; wanted uint8 (N, H, W, 3)", hint="stack RGB pictures"
            )
        return np.concatenate([self._rows(pixels[at : at + BATCH]) for at in range(0, len(pixels), BATCH)])

    def _rows(self, pixels: NDArray[np.uint8]) -> Array:
        x = to_network(pixels, self.convention)
        try:
            rows = np.asarray(self._run(x))
        except Exception as error:  # runtimes raise their own kinds
            raise ArtifactError(
                f"{self.name}: cannot run on float32 {x.shape}: {str(error).strip().splitlines()[-1]}",
                hint=f"it was fed SIZE:LOW:HIGH {self.convention}; name the network's own",
            ) from error
        if len(rows) != len(pixels) or not np.issubdtype(rows.dtype, np.floating):
            raise ArtifactError(
                f"{self.name}: returned {rows.dtype} {rows.shape} for {len(pixels)} pictures; wanted a row for each",
                hint="a feature network takes (N, 3, H, W) and returns (N, F)",
            )
        return np.asarray(rows.reshape(len(rows), -1), np.float32)


def open_features(path: str | Path, convention: Convention | None = None) -> FeatureNetwork:
    """Open an .onnx file with one input (N, 3, H, W) and, first of its outputs, features (N, F).

    TorchScript is opened by `sdedit.export.features.open_features`. Raises ArtifactError, BackendUnavailable.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise OptionError(
            f"{path}: not an .onnx file", hint="sdedit.export.features.open_features opens TorchScript, with torch"
        )
    session = open_onnx(path, inputs=1)
    name = session.get_inputs()[0].name
    return FeatureNetwork(path, convention or Convention(), lambda x: session.run(None, {name: x})[0])


def open_onnx(path: Path, *, inputs: int) -> Any:
    """An ONNX Runtime session on the CPU with that many inputs. Raises ArtifactError, BackendUnavailable."""
    require_file(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"{path}: onnxruntime cannot be imported: {error}", hint="pip install 'sdedit-engine[cpu]'"
        ) from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds
        raise ArtifactError(
            f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}", hint="check the file in Netron"
        ) from error
    if (found := len(session.get_inputs())) != inputs:
        raise ArtifactError(
            f"{path}: has {found} inputs; wanted {inputs} of shape (N, 3, H, W)", hint="this is another kind of network"
        )
    return session


def require_file(path: Path) -> None:
    """Raise ArtifactError unless the file is there."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", hint="name a network's .onnx or TorchScript file")


def to_network(pixels: NDArray[np.uint8], convention: Convention) -> Array:
    """(N, H, W, 3) uint8 -> (N, 3, size, size) float32 in the network's range. Scaled in float, so nothing rounds."""
    x = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    size = convention.size
    if size is not None and x.shape[2:] != (size, size):
        planes = (Image.fromarray(plane) for plane in x.reshape(-1, *x.shape[2:]))
        scaled = [np.asarray(plane.resize((size, size), Resampling.BILINEAR)) for plane in planes]
        x = np.stack(scaled).reshape(len(pixels), 3, size, size)
    return np.ascontiguousarray(x * np.float32((convention.high - convention.low) / 255) + np.float32(convention.low))
