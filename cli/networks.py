"""Feature and distance networks that commands are pointed at: ONNX by the engine, TorchScript by export's torch."""

from typing import TYPE_CHECKING, Any

from sdedit.errors import BackendUnavailable

if TYPE_CHECKING:
    from sdedit.features import Convention, DistanceNetwork, FeatureNetwork


def open_features(path: str, convention: "Convention | None" = None) -> "FeatureNetwork":
    """Raises ArtifactError, BackendUnavailable."""
    opened: FeatureNetwork = _opener(path).open_features(path, convention)
    return opened


def open_lpips(path: str) -> "DistanceNetwork":
    """Raises ArtifactError, BackendUnavailable."""
    opened: DistanceNetwork = _opener(path).open_lpips(path)
    return opened


def _opener(path: str) -> Any:
    if path.lower().endswith(".onnx"):
        from sdedit import features as of_onnx

        return of_onnx
    try:
        from sdedit.export import features as of_torchscript
    except ImportError as error:
        raise BackendUnavailable(
            f"{path}: TorchScript needs torch, which cannot be imported: {error}",
            hint="pip install 'sdedit-engine[export]', or name an .onnx file",
        ) from error
    return of_torchscript
