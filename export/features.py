"""Networks that measure pictures, as TorchScript files; `sdedit.features` opens those as ONNX."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdedit import features as onnx
from sdedit.errors import ArtifactError
from sdedit.features import Convention, DistanceNetwork, FeatureNetwork, require_file

Array = NDArray[np.float32]


def open_features(path: str | Path, convention: Convention | None = None) -> FeatureNetwork:
    """Open a feature network: .onnx, or else TorchScript taking (N, 3, H, W) and returning (N, F).

    A module with an argument `return_features` (the Inception of StyleGAN's metrics) is called with True. TorchScript
    runs in float32 on the GPU where torch sees one. Raises ArtifactError, BackendUnavailable.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return onnx.open_features(path, convention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = open_script(path).to(device)
    asked = {"return_features": True} if "return_features" in _arguments(module) else {}

    def run(x: Array) -> Array:
        # the interpreter as it is: compiling fused kernels takes longer than most evaluations save by them
        with torch.inference_mode(), _full_float32(), torch.jit.optimized_execution(device == "cpu"):
            return module(torch.from_numpy(x).to(device), **asked).cpu().numpy()

    return FeatureNetwork(path, convention or Convention(), run)


def open_lpips(path: str | Path) -> DistanceNetwork:
    """Open a distance of pictures: .onnx, or else TorchScript taking two (N, 3, H, W) in [-1, 1] and returning (N,).

    Raises ArtifactError, BackendUnavailable.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return onnx.open_lpips(path)
    module = open_script(path)

    def run(a: Array, b: Array) -> Array:
        with torch.inference_mode():
            return module(torch.from_numpy(a), torch.from_numpy(b)).numpy()

    return DistanceNetwork(path, run)


def open_script(path: Path) -> Any:
    """A TorchScript module on the CPU. Raises ArtifactError."""
    require_file(path)
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # a RuntimeError with many lines, as a rule
        raise ArtifactError(
            f"{path}: not TorchScript: {str(error).strip().splitlines()[0]}",
            hint="torch.jit.save writes it; a state dict alone is not a network",
        ) from error


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, which is PyTorch's default for them."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _arguments(module: Any) -> set[str]:
    return {argument.name for argument in module.forward.schema.arguments}
