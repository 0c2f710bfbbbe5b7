"""From a source to a verified artifact: trace, reduce, compare with the original, and only then write."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sdedit import __version__, artifact, output, verify
from sdedit.backends.ort import OrtBackend
from sdedit.errors import OptionError, OutOfTolerance
from sdedit.export import precision as precisions
from sdedit.export import schedules, to_onnx
from sdedit.export.checkpoints import parameter_count
from sdedit.export.denoiser import Denoiser
from sdedit.export.graph import OPSETS, set_opset
from sdedit.export.int8 import quantize
from sdedit.export.source import Source
from sdedit.sde import Sde, from_metadata
from sdedit.verify import Array

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CHEAP = 10e6 * 64**2  # parameters x pixels below which the reference computes in float64
CALIBRATION_STEPS = 12  # network inputs a guide, from as many noise levels

Report = verify.Report
Say = Callable[[str], None]


@dataclass
class Graph:
    """A float32 graph D(x; σ), what computes the same in the original, and the metadata to write."""

    model: onnx.ModelProto
    reference: verify.Bind
    metadata: dict[str, Any]
    against: str  # what the reference is, for the user
    conditions: Mapping[str, float] = field(default_factory=dict)  # values that the reference uses


def from_source(source: Source, *, opset: int | None = None, dynamic: bool = False, name: str | None = None) -> Graph:
    """Trace a network that a family's loader returned."""
    denoiser = Denoiser(source.net, source.convention).eval()
    shape = (source.channels, source.height, source.width)
    traced = min(chosen_opset(opset, OPSETS[0], "fp32"), max(to_onnx.TRACED_OPSETS))
    model = to_onnx.trace(denoiser, shape, source.conditions, opset=traced, dynamic=dynamic)
    conditions = {n: float(min(1, declared.get("count", 2) - 1)) for n, declared in source.conditions.items()}
    image_fields = {"channels": shape[0], "height": shape[1], "width": shape[2]}
    metadata: dict[str, Any] = {
        "format": artifact.FORMAT,
        "name": name or source.name or source.family,
        "image": image_fields | ({"multiple": source.multiple, "dynamic": True} if dynamic else {}),
        "sde": schedules.as_metadata(source.convention.sde),
        "precision": "fp32",
        "source": {"family": source.family, "weights": source.weights, **source.details, **tool_versions()},
    }
    if source.conditions:
        metadata["inputs"] = dict(source.conditions)
    if source.sigma_range:
        metadata["sigma_range"] = list(source.sigma_range)
    if source.license:
        metadata["license"] = source.license
    double = parameter_count(source.net) * shape[1] * shape[2] <= CHEAP
    against = f"PyTorch {torch.__version__}, {'float64' if double else 'float32'}"
    return Graph(model, torch_reference(denoiser, source.conditions, conditions, double), metadata, against, conditions)


def from_artifact(path: Path, scratch: Path) -> Graph:
    """One of our own artifacts, to be written in another precision or opset."""
    opened = artifact.read(path)
    conditions = {n: float(min(1, (extra.count or 2) - 1)) for n, extra in opened.extra_inputs.items()}
    if opened.precision == "int8":
        raise OptionError(f"{path} is int8; nothing better can be made of it", hint="export the fp32 artifact instead")
    model = precisions.widen(onnx.load(path))
    reference_path = path
    if opened.precision == "bf16":  # which ONNX Runtime does not run on the CPU; widened it is the same function
        reference_path = scratch / "widened.onnx"
        to_onnx.save(onnx.load_from_string(model.SerializeToString()), reference_path, opened.metadata)
    metadata = dict(opened.metadata)
    origin = {"exported_from": {"sha256": opened.sha256, "precision": opened.precision}}
    metadata["source"] = (metadata.get("source") or {}) | origin | tool_versions()
    reference = OrtBackend(artifact.read(reference_path), "ort-cpu", None)
    bind = partial(reference.bind, conditions=conditions)
    return Graph(model, bind, metadata, f"{path.name} in ONNX Runtime", conditions)


def write(
    graph: Graph,
    path: Path,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    guides: Sequence[Path] = (),
    allow_inaccurate: bool = False,
    force: bool = False,
    say: Say = lambda _: None,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the artifact in `precision`, if it is the same function as the original to within its tolerance.

    guides: pictures for calibration (int8) and for the edits that are compared; default: three bundled ones.
    Returns how the comparison came out; nothing is written where it is not `within`, unless allow_inaccurate.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}", hint=f"choose one of {', '.join(PRECISIONS)}")
    opset = chosen_opset(opset, to_onnx.opset_of(graph.model), precision)
    output.check([path], force=force, inputs=list(guides))
    sde = from_metadata(graph.metadata["sde"])
    frames = verify.guide_frames(guides, graph.metadata["image"])
    with tempfile.TemporaryDirectory(prefix=".sdedit-", dir=path.parent) as folder:
        scratch = Path(folder)
        model = set_opset(graph.model, opset)
        if precision in ("fp16", "bf16"):
            model = precisions.halve(model, precision)
        elif precision == "int8":
            say("calibrating int8")
            model = quantize(model, calibration(graph, sde, frames))
        metadata = graph.metadata
        metadata["precision"] = precision
        runnable = scratch / path.name
        if precision in ("fp16", "bf16"):  # as a GPU rounds: ONNX Runtime's CPU has no bf16, and drops fp16 roundings
            runnable = scratch / "emulated.onnx"
            to_onnx.save(precisions.emulate(model), runnable, metadata)
        files = to_onnx.save(model, scratch / path.name, metadata)
        output.check([path.with_name(file.name) for file in files], force=force, inputs=[])
        candidate = partial(OrtBackend(artifact.read(runnable), "ort-cpu", None).bind, conditions=graph.conditions)
        report = verify.compare(
            graph.reference, candidate, sde, frames[:2], tolerance=verify.TOLERANCES[precision],
            with_images=precision != "fp32", on_evaluation=on_evaluation,
        )  # fmt: skip
        if not report.within and not allow_inaccurate:
            return report
        metadata["verification"] = {
            "against": graph.against, "worst": report.worst.error, "within": report.within,
        }  # fmt: skip
        to_onnx.replace_metadata(files[0], metadata)
        for file in reversed(files):  # the artifact itself last
            os.replace(file, path.with_name(file.name))
    return report


def chosen_opset(asked: int | None, own: int, precision: str) -> int:
    """The opset asked for; else the graph's own, or the first that has this precision. Raises OptionError."""
    first = precisions.FIRST_BF16_CONV if precision == "bf16" else OPSETS[0]
    if asked is not None and not first <= asked <= OPSETS[-1]:
        raise OptionError(
            f"opset is {asked}; wanted {first} to {OPSETS[-1]} for {precision}",
            hint=f"leave it out for {first}",
        )
    return asked or min(max(own, first), OPSETS[-1])


def out_of_tolerance(report: Report, path: Path) -> OutOfTolerance:
    """The error that says by how much."""
    worst = report.worst
    return OutOfTolerance(
        f"{path}: not written: error {worst.error:.2g} at σ = {worst.sigma:.4g}, tolerance {report.tolerance:.2g}",
        hint="--precision fp32 is the most exact; --allow-inaccurate writes it all the same, marked",
    )


def calibration(graph: Graph, sde: Sde, frames: Array) -> list[dict[str, np.ndarray]]:
    """The network's inputs along real edits of the guides, from the usual t0 and from near the top of the schedule."""
    declared = graph.metadata.get("inputs") or {}
    extra = {name: np.full(2, value, declared[name]["dtype"]) for name, value in graph.conditions.items()}
    pairs = [np.resize(frames[at : at + 2], (2, *frames.shape[1:])) for at in range(0, len(frames), 2)]
    return [
        {"x": x, "sigma": sigma, **extra}
        for pair in pairs
        for t0 in (0.5, 0.9)
        for x, sigma, _ in verify.visited(graph.reference(2), sde, pair, t0=t0, steps=CALIBRATION_STEPS)
    ]


def torch_reference(
    denoiser: torch.nn.Module,
    declared: Mapping[str, Mapping[str, Any]],
    conditions: Mapping[str, float],
    double: bool,
) -> verify.Bind:
    """The module itself as a denoiser of NumPy arrays."""
    dtype = torch.float64 if double else torch.float32
    denoiser = denoiser.to(dtype)

    @torch.inference_mode()
    def reference(x: Array, sigma: Array) -> Array:
        given = [torch.from_numpy(np.ascontiguousarray(v)).to(dtype) for v in (x, sigma)]
        extra = [torch.full((len(x),), conditions[n], dtype=getattr(torch, d["dtype"])) for n, d in declared.items()]
        denoised: Array = denoiser(*given, *extra).numpy()
        return denoised

    return lambda batch: reference


def tool_versions() -> dict[str, str]:
    return {"torch": torch.__version__, "onnx": onnx.__version__, "sdedit_engine": __version__}
