"""The same network in other files: artifacts that lie beside one, known by what the exporter wrote into them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdedit import artifact as artifacts
from sdedit.artifact import Artifact
from sdedit.errors import ArtifactError

TOOLS = ("exported_from", "torch", "onnx", "sdedit_engine")  # in `source`, and not of where the weights came from


def companions(artifact: Artifact) -> list[Artifact]:
    """The other artifacts in its folder that say they are the same network: in another precision, say.

    Made from this very file, or both from one checkpoint; of copies one. Whether that is true, `verify` shows.
    """
    found = {other.sha256: other for other in _beside(artifact.path) if _claims_to_be(other, artifact)}
    found.pop(artifact.sha256, None)  # a copy
    return list(found.values())


def with_sha256(path: Path, sha256: str) -> Path:
    """The file that is meant by `path` in a record: itself, or the companion beside it with this SHA-256."""
    named = artifacts.read(path)
    if named.sha256 == sha256:
        return path
    return next((other.path for other in companions(named) if other.sha256 == sha256), path)


def _beside(path: Path) -> Iterator[Artifact]:
    for file in sorted(path.parent.glob("*.onnx")):
        try:
            if not file.samefile(path):
                yield artifacts.read(file)
        except (ArtifactError, OSError):  # something else, or half a file
            continue


def _claims_to_be(other: Artifact, artifact: Artifact) -> bool:
    same = ("image", "sde", "inputs")
    if any(other.metadata.get(name) != artifact.metadata.get(name) for name in same):
        return False
    checkpoint = _checkpoint(artifact)
    from_one_checkpoint = "sha256" in checkpoint and checkpoint == _checkpoint(other)
    return from_one_checkpoint or artifact.sha256 in _ancestors(other)


def _source(artifact: Artifact) -> dict[str, Any]:
    source = artifact.metadata.get("source")
    return source if isinstance(source, dict) else {}


def _checkpoint(artifact: Artifact) -> dict[str, Any]:
    """What the weights are."""
    return {name: value for name, value in _source(artifact).items() if name not in TOOLS}


def _ancestors(artifact: Artifact) -> set[str]:
    """SHA-256 of the artifacts that it was exported from, one after the other."""
    found, source = set[str](), _source(artifact)
    while isinstance(source := source.get("exported_from"), dict):  # type: ignore[assignment]
        found.add(str(source.get("sha256")))
    return found
