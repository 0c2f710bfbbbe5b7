"""What ONNX Runtime's CPU provider is to run for an artifact: its own optimised graph, with the operators that this
package brings in the place of those that are slower, where both give the same picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdedit.artifact import Artifact
from sdedit.backends.ort_fusion import fuse
from sdedit.noise import STREAM_STATE, Noise
from sdedit.operators import shipped

GRAPH, WEIGHTS = "graph.onnx", "graph.weights"  # of `keep`
SIGMA, SEED = 1.0, 0  # of the picture that both are tried on
# The most by which they may differ, as a part of the picture (root mean squares): rounding, which int8 magnifies.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "int8": 1e-1}

Change = Callable[[Any], None]  # sets what is special in SessionOptions
Open = Callable[[str | None, Change | None], Any]  # opens a file, None for the artifact itself, as a session


def open_fused(artifact: Artifact, open_with: Open, scratch: Path, kept: Path | None = None) -> Any:
    """A session with this package's operators; None where there is no use for them.

    scratch: a folder; kept: one to make, for what the session can be opened from again.
    Raises what `open_with` raises, OSError and ValueError.
    """
    if shipped.library() is None:
        return None
    own = scratch / "portable"
    plain = open_with(None, keep(own, portable=True))
    fused = fuse((own / GRAPH).read_bytes())
    if fused is None:
        return None
    (own / GRAPH).write_bytes(fused)
    expected = _tried(plain, artifact)
    del plain  # and its weights, before they are held again
    session = open_with(str(own / GRAPH), know_operators if kept is None else keep(kept))
    error = np.sqrt(np.mean((_tried(session, artifact) - expected) ** 2) / np.mean(expected**2))
    return session if error <= TOLERANCES.get(artifact.precision, 0) else None


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
    if (library := shipped.library()) is not None:
        options.register_custom_ops_library(str(library))


def _tried(session: Any, artifact: Artifact) -> Any:
    """The network's result for noise, a float64 array."""
    width, height = artifact.frame()
    told = {
        "x": Noise([SEED], (artifact.channels, height, width))(0, 0, STREAM_STATE),
        "sigma": np.full(1, SIGMA, np.float32),
        **{name: np.zeros(1, extra.dtype) for name, extra in artifact.extra_inputs.items()},
    }
    return session.run(["denoised"], told)[0].astype(np.float64)
