"""What ONNX Runtime's CPU provider is to run for an artifact: its own optimised graph, with the operators that this
package brings in the place of those that are slower, where both give the same picture.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit import verify
from sdedit.artifact import Artifact
from sdedit.backends.ort_fusion import fuse
from sdedit.noise import STREAM_STATE, Noise
from sdedit.operators import shipped

GRAPH, WEIGHTS = "graph.onnx", "graph.weights"  # of `keep`
SIGMA, SEEDS = 1.0, (0, 1)  # of the pictures that both are tried on
# The most by which they may differ, as a part of the picture (root mean squares): rounding. In int8 a number that falls
# on the other side of a boundary moves by a whole step of 256: 0.01 has been seen with a U-Net of 155 layers.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "int8": 1e-1}
# In half precision, for a float32 artifact: as many times what `verify` lets pass, by its measure. How far off an edit
# may be is for `verify` itself to say.
HALF_MARGIN = 2

_agreed: set[tuple[str, str, str]] = set()  # what need not be tried again in this process

Change = Callable[[Any], None]  # sets what is special in SessionOptions
Open = Callable[[str | None, Change | None], Any]  # opens a file, None for the artifact itself, as a session


def open_fused(
    artifact: Artifact, open_with: Open, scratch: Path, kept: Path | None = None, *, half: str | None = None
) -> Any:
    """A session with this package's operators; None where there is no use for them.

    scratch: a folder; kept: one to make, for what the session can be opened from again. half: "fp16" or "bf16", of
    the convolutions of a float32 artifact; there is no use where it has none.
    Raises what `open_with` raises, OSError and ValueError.
    """
    if shipped.usable_library() is None:
        return None
    own = scratch / "portable"
    plain = open_with(None, keep(own, portable=True))
    fusions: dict[str | None, bytes] = {}
    for one in (None, half):  # in float32 first: there nothing but rounding may differ
        if (fused := fuse((own / GRAPH).read_bytes(), half=one)) is None:
            return None
        fusions[one] = fused
    keys = {
        one: (artifact.sha256, shipped.version(), hashlib.sha256(fused).hexdigest()) for one, fused in fusions.items()
    }
    told = _noise(artifact)
    expected = None if _agreed.issuperset(keys.values()) else _tried(plain, told)
    del plain  # and its weights, before they are held again
    session = None
    for one, fused in fusions.items():
        if keys[one] in _agreed and one != half:
            continue
        session = None  # with its weights, too
        (own / GRAPH).write_bytes(fused)
        session = open_with(str(own / GRAPH), know_operators if kept is None or one != half else keep(kept))
        if expected is not None and keys[one] not in _agreed:
            if not _agree(told["x"], expected, _tried(session, told), artifact.precision, one):
                return None
            _agreed.add(keys[one])
    return session


def keep(folder: Path, portable: bool = False) -> Change:
    """Make `folder`, and write there what the optimiser made; portable: without what it does for this processor."""

    def change(options: Any) -> None:
        import onnxruntime

        folder.mkdir(mode=0o700)
        options.optimized_model_filepath = str(folder / GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        if portable:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        know_operators(options)

    return change


def know_operators(options: Any) -> None:
    """Let the session have this package's operators, where there are any for this machine."""
    if (library := shipped.usable_library()) is not None:
        options.register_custom_ops_library(str(library))


def _noise(artifact: Artifact) -> dict[str, NDArray[Any]]:
    """Two pictures of it: what a graph makes of one alone says nothing of batches."""
    width, height = artifact.frame()
    return {
        "x": Noise(SEEDS, (artifact.channels, height, width))(0, 0, STREAM_STATE),
        "sigma": np.full(len(SEEDS), SIGMA, np.float32),
        **{name: np.zeros(len(SEEDS), extra.dtype) for name, extra in artifact.extra_inputs.items()},
    }


def _tried(session: Any, told: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """The network's result. Raises what ONNX Runtime raises."""
    found: NDArray[np.float64] = session.run(["denoised"], told)[0].astype(np.float64)
    return found


def _agree(x: NDArray[Any], wanted: NDArray[Any], found: NDArray[Any], precision: str, half: str | None) -> bool:
    """Not those of a network that gives Inf or NaN, whose graph is left as it is."""
    with np.errstate(all="ignore"):
        if half is not None:
            most = HALF_MARGIN * verify.TOLERANCES[half]  # for each picture: NaN is not within it
            return all(verify.relative_error(*picture) <= most for picture in zip(x, wanted, found, strict=True))
        apart, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
        return bool(apart <= TOLERANCES.get(precision, 0) * size)
