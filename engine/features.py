"""Networks of the user's own that measure pictures: features, such as FID's Inception gives, and LPIPS distances."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from sdedit.checks import real, whole
from sdedit.errors import ArtifactError, BackendUnavailable, OptionError

Array = NDArray[np.float32]
Run = Callable[[Array], Array]  # (B, 3, H, W) -> (B, F)
RunPair = Callable[[Array, Array], Array]  # (B, 3, H, W) twice -> (B,), or with sides of 1 behind it

MOST_SIDE = 4096
BATCH = 16  # pictures in a network call


@dataclass(frozen=True)
class Convention:
    """What a feature network is fed. The default is that of FID's Inception: 299 pixels, (pixel − 128) / 128."""

    size: int | None = 299  # both sides are scaled to it, bilinearly; None leaves pictures as they are
    low: float = -1.0  # what pixel 0 becomes
    high: float = 0.9921875  # and what 255 becomes

    def __post_init__(self) -> None:
        """Raises OptionError."""
        hint = "SIZE:LOW:HIGH, such as own:-1:1"
        if self.size is not None:
            whole("size", self.size, 1, MOST_SIDE, hint=hint)
        for name in ("low", "high"):
            real(name, getattr(self, name), -1e6, 1e6, with_low=True, hint=hint)

    def __str__(self) -> str:
        return f"{self.size or 'own'}:{self.low!r}:{self.high!r}"


UNSCALED = Convention(None, -1.0, 1.0)


class FeatureNetwork:
    """Called with uint8 pictures (N, H, W, 3); returns float32 (N, F). Made by `open_features`."""

    def __init__(self, path: Path, convention: Convention, run: Run) -> None:
        self.name, self.sha256, self.convention, self._run = path.name, _sha256(path), convention, run

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Raises OptionError (not pictures), ArtifactError (the network cannot run them, or returns no rows)."""
        _require_pictures(pixels)
        return np.concatenate([self._rows(pixels[at : at + BATCH]) for at in range(0, len(pixels), BATCH)])

    def _rows(self, pixels: NDArray[np.uint8]) -> Array:
        x = to_network(pixels, self.convention)
        try:
            rows = np.asarray(self._run(x))
        except Exception as error:  # runtimes raise their own kinds
            raise ArtifactError(
                f"{self.name}: cannot run on float32 {x.shape}: {_cause(error)}",
                hint=f"it was fed SIZE:LOW:HIGH {self.convention}; name the network's own",
            ) from error
        if rows.ndim == 0 or len(rows) != len(pixels) or not rows.size or not np.issubdtype(rows.dtype, np.floating):
            raise ArtifactError(
                f"{self.name}: returned {rows.dtype} {rows.shape} for {len(pixels)} pictures; wanted a row for each",
                hint="a feature network takes (N, 3, H, W) and returns (N, F)",
            )
        if not np.isfinite(rows).all():
            raise ArtifactError(
                f"{self.name}: returned NaN or Inf",
                hint=f"it was fed SIZE:LOW:HIGH {self.convention}; check that, and its file",
            )
        return np.asarray(rows.reshape(len(rows), -1), np.float32)


class DistanceNetwork:
    """LPIPS, or another distance of two pictures. Called with uint8 pictures (N, H, W, 3) twice; returns float32 (N,).

    The network is fed values in [-1, 1]. Made by `open_lpips`.
    """

    def __init__(self, path: Path, run: RunPair) -> None:
        self.name, self.sha256, self._run = path.name, _sha256(path), run

    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8], *, mask: NDArray[np.uint8] | None = None) -> Array:
        """mask: (N, H, W), 0 = keep. With one, both pictures are grey wherever it is not 0, so that only the kept part
        can differ. Raises OptionError (not pictures, or of another size than each other or their masks), ArtifactError
        (the network cannot run them, or returns no distances).
        """
        _require_pictures(a)
        _require_pictures(b)
        if a.shape != b.shape or (mask is not None and mask.shape != a.shape[:3]):
            raise OptionError(
                f"pictures are {a.shape} and {b.shape}{'' if mask is None else f', masks {mask.shape}'}",
                hint="pairs and their masks have one size: (N, H, W, 3), (N, H, W, 3) and (N, H, W)",
            )
        parts = [slice(at, at + BATCH) for at in range(0, len(a), BATCH)]
        return np.concatenate([self._distances(a[one], b[one], None if mask is None else mask[one]) for one in parts])

    def _distances(self, a: NDArray[np.uint8], b: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> Array:
        pair = [to_network(pixels, UNSCALED) for pixels in (a, b)]
        if mask is not None:
            for x in pair:
                x *= (mask == 0)[:, None]
        try:
            distances = np.asarray(self._run(*pair))
        except Exception as error:  # runtimes raise their own kinds
            raise ArtifactError(
                f"{self.name}: cannot run on two float32 {pair[0].shape}: {_cause(error)}",
                hint="a distance takes two (N, 3, H, W) and returns (N,)",
            ) from error
        if distances.size != len(a):
            raise ArtifactError(
                f"{self.name}: returned {distances.shape} for {len(a)} pairs; wanted one value a pair",
                hint="a distance takes two (N, 3, H, W) and returns (N,)",
            )
        if not np.isfinite(distances).all():
            raise ArtifactError(
                f"{self.name}: returned NaN or Inf", hint="a distance is fed pictures in [-1, 1]; check its file"
            )
        return np.asarray(distances.reshape(-1), np.float32)


def open_features(path: str | Path, convention: Convention | None = None) -> FeatureNetwork:
    """Open an .onnx file with one input (N, 3, H, W) and, first of its outputs, features (N, F).

    TorchScript is opened by `sdedit.export.features.open_features`. Raises ArtifactError, BackendUnavailable.
    """
    path = Path(path)
    _require_onnx(path, "open_features")
    session = open_onnx(path, inputs=1)
    name = session.get_inputs()[0].name
    return FeatureNetwork(path, convention or Convention(), lambda x: session.run(None, {name: x})[0])


def open_lpips(path: str | Path) -> DistanceNetwork:
    """Open an .onnx file that takes two pictures (N, 3, H, W) in [-1, 1] and returns their distances, (N,).

    TorchScript is opened by `sdedit.export.features.open_lpips`. Raises ArtifactError, BackendUnavailable.
    """
    path = Path(path)
    _require_onnx(path, "open_lpips")
    session = open_onnx(path, inputs=2)
    first, second = (one.name for one in session.get_inputs())
    return DistanceNetwork(path, lambda a, b: session.run(None, {first: a, second: b})[0])


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


def _require_pictures(pixels: NDArray[np.uint8]) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise OptionError(
            f"pictures are {pixels.dtype} {pixels.shape}; wanted uint8 (N, H, W, 3)", hint="stack RGB pictures"
        )


def _require_onnx(path: Path, opener: str) -> None:
    if path.suffix.lower() != ".onnx":
        raise OptionError(
            f"{path}: not an .onnx file", hint=f"sdedit.export.features.{opener} opens TorchScript, with torch"
        )


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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cause(error: Exception) -> str:
    """In one line: all that a runtime says, without TorchScript's traceback."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[-1] if "Traceback" in said else " ".join(said.split())
