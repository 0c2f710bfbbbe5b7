"""From a source to a verified artifact: trace, reduce, compare with the original, and only then write."""

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from sdedit.noise import STREAM_STATE, Noise
from sdedit.output import writing
from sdedit.sde import Sde, from_metadata
from sdedit.verify import Array

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CHEAP = 10e6 * 64**2  # parameters x pixels below which the reference computes in float64
CALIBRATION_STEPS = 12  # inputs of the network a guide, twice, from as many noise levels
CALIBRATION_REPEAT = 1  # noise that no comparison uses

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
    if source.family == "module":
        try_network(source)
    traced = min(chosen_opset(opset, OPSETS[0], "fp32"), max(to_onnx.TRACED_OPSETS))
    try:
        model = to_onnx.trace(denoiser, shape, source.conditions, opset=traced, dynamic=dynamic)
    except Exception as error:  # of torch's exporter, dozens of kinds
        raise OptionError(
            f"the network cannot be written as ONNX: {summary_of(error)}", hint="use operators that ONNX opset 18 has"
        ) from error
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
    double = parameter_count(source.net) * shape[1] * shape[2] <= CHEAP and runs_in_double(source)
    against = f"PyTorch {torch.__version__}, {'float64' if double else 'float32'}"
    return Graph(model, torch_reference(denoiser, source.conditions, conditions, double), metadata, against, conditions)


def from_artifact(path: Path, scratch: Path) -> Graph:
    """One of our own artifacts, to be written in another precision or opset."""
    opened = artifact.read(path)
    conditions = verify.any_conditions(opened)
    if opened.precision == "int8":
        raise OptionError(f"{path} is int8; nothing better can be made of it", hint="export the fp32 artifact instead")
    model = precisions.widen(onnx.load(path))
    reference_path = path
    if opened.precision == "bf16":  # which ONNX Runtime does not run on the CPU; widened it is the same function
        reference_path = scratch / "widened.onnx"
        to_onnx.save(onnx.load_from_string(model.SerializeToString()), reference_path, opened.metadata)
    metadata = dict(opened.metadata)
    source = dict(metadata.get("source") or {})
    earlier = {"exported_from": source["exported_from"]} if "exported_from" in source else {}
    origin = {"sha256": opened.sha256, "precision": opened.precision, **earlier}
    metadata["source"] = source | {"exported_from": origin} | tool_versions()
    reference = OrtBackend(artifact.read(reference_path), "ort-cpu", None, keeps_graph=reference_path is path)
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
    Returns how the comparison came out; nothing is written where it is not `within`, unless allow_inaccurate. Raises
    OutOfTolerance where nothing can be int8.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}", hint=f"choose one of {', '.join(PRECISIONS)}")
    opset = chosen_opset(opset, to_onnx.opset_of(graph.model), precision)
    output.check([path], force=force, inputs=list(guides))
    sde = from_metadata(graph.metadata["sde"])
    frames = verify.guide_frames(guides, graph.metadata["image"])
    with writing(path), tempfile.TemporaryDirectory(prefix=".sdedit-", dir=path.parent) as folder:
        scratch = Path(folder)
        model = set_opset(graph.model, opset)
        metadata = graph.metadata
        metadata["precision"] = precision

        files: list[Path] = []
        emulated = precision in ("fp16", "bf16")  # as a GPU rounds: ONNX Runtime's CPU has neither's roundings
        runnable = scratch / ("emulated.onnx" if emulated else path.name)

        def save(model: onnx.ModelProto) -> None:
            if emulated:
                to_onnx.save(precisions.emulate(model), runnable, metadata)
            files[:] = to_onnx.save(model, scratch / path.name, metadata)
            output.check([path.with_name(file.name) for file in files], force=force, inputs=[])

        def compare(*, last: bool = True) -> Report:
            """How what is saved comes out. last: it is not only asked whether it is within."""
            backend = OrtBackend(artifact.read(runnable), "ort-cpu", None, keeps_graph=False)  # no file that stays
            candidate = partial(backend.bind, conditions=graph.conditions)
            report = verify.compare(
                graph.reference, candidate, sde, frames[:2], tolerance=verify.TOLERANCES[precision],
                with_images=last and precision != "fp32", on_evaluation=on_evaluation,
            )  # fmt: skip
            if graph.metadata["image"].get("dynamic"):
                other = at_another_size(graph, candidate, sde)
                report = replace(report, evaluations=(*report.evaluations, other))
            return report

        def excess(model: onnx.ModelProto) -> float:
            save(model)
            if allow_inaccurate:
                return 0.0
            report = compare(last=False)
            worst = report.worst
            if not report.within:
                found = f"error {worst.error:.2g} at σ = {worst.sigma:.4g}, tolerance {report.tolerance:.2g}"
                say(f"{found}: again with fewer layers")
            return worst.error / report.tolerance

        if precision == "int8":
            say("calibrating int8")
            model = quantize(model, calibration(graph, sde, frames), excess=excess)
            if all(node.op_type != "QuantizeLinear" for node in model.graph.node):
                raise OutOfTolerance(
                    f"{path}: not written: no layer of the network may be int8 within the tolerance",
                    hint="--precision fp32; --guide PICTURE calibrates on pictures of your own",
                )
        else:
            save(precisions.halve(model, precision) if emulated else model)
        report = compare()
        if not report.within and not allow_inaccurate:
            return report
        metadata["verification"] = {
            "against": graph.against, "worst": verify.finite(report.worst.error),
            "within": report.within and (metadata.get("verification") or {}).get("within", True),
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
    better = "--precision fp32 is the most exact"
    if report.tolerance <= verify.TOLERANCES["fp32"]:
        better = "a network that chooses by values, as with `if t[0] > 500`, is not traced"
    return OutOfTolerance(
        f"{path}: not written: error {worst.error:.2g} at σ = {worst.sigma:.4g}, tolerance {report.tolerance:.2g}",
        hint=f"{better}; --allow-inaccurate writes it all the same, marked",
    )


def calibration(graph: Graph, sde: Sde, frames: Array) -> list[dict[str, np.ndarray]]:
    """Inputs of the network: along edits of the guides, and the guides with fresh noise, as networks are trained.

    Edits from the usual t0; noise of levels from the highest to the lowest.
    """
    declared = graph.metadata.get("inputs") or {}
    extra = {name: np.full(2, value, declared[name]["dtype"]) for name, value in graph.conditions.items()}
    top = verify.times_of(sde)[-1]
    levels = np.geomspace(sde.sigma(top), sde.sigma_min, CALIBRATION_STEPS, dtype=np.float32)
    feeds = []
    for at in range(0, len(frames), 2):
        pair = np.resize(frames[at : at + 2], (2, *frames.shape[1:]))
        noise = Noise((at, at + 1), pair.shape[1:])
        visits = verify.visited(graph.reference(2), sde, pair, t0=min(0.5, top), steps=CALIBRATION_STEPS)
        feeds += [{"x": x, "sigma": sigma, **extra} for x, sigma, _ in visits]
        for step, level in enumerate(levels):
            noised = pair + level * noise(step, CALIBRATION_REPEAT, STREAM_STATE)
            feeds.append({"x": noised, "sigma": np.full(2, level), **extra})
    return feeds


def torch_reference(
    denoiser: torch.nn.Module,
    declared: Mapping[str, Mapping[str, Any]],
    conditions: Mapping[str, float],
    double: bool,
) -> verify.Bind:
    """The module itself as a denoiser of NumPy arrays."""
    dtype = torch.float64 if double else torch.float32
    denoiser = denoiser.to(dtype)

    def bind(batch: int, size: tuple[int, int] | None = None) -> verify.Denoiser:
        return reference  # which takes any batch and size

    @torch.inference_mode()
    def reference(x: Array, sigma: Array) -> Array:
        given = [torch.from_numpy(np.ascontiguousarray(v)).to(dtype) for v in (x, sigma)]
        extra = [torch.full((len(x),), conditions[n], dtype=getattr(torch, d["dtype"])) for n, d in declared.items()]
        denoised: Array = denoiser(*given, *extra).numpy()
        return denoised

    return bind


def try_network(source: Source) -> None:
    """Call a network of unknown making once. Raises OptionError for what it cannot be."""
    x, label, extra = example(source, torch.float32)
    called = f"net(x {list(x.shape)}, label [2]{''.join(f', {name} [2]' for name in source.conditions)})"
    try:
        with torch.inference_mode():
            raw = source.net(x, label, *extra)
    except Exception as error:  # whatever the user's code raises
        raise OptionError(
            f"{called} raised {summary_of(error)}", hint="that is how it is called, in float32"
        ) from error
    found = list(raw.shape) if isinstance(raw, torch.Tensor) else type(raw).__name__
    if found not in ([2, c, *x.shape[2:]] for c in (source.channels, 2 * source.channels)):
        raise OptionError(
            f"{called} returned {found}; wanted {list(x.shape)}, or twice the channels with a learned variance",
            hint="--size and --channels describe its images",
        )
    if raw.dtype != torch.float32:
        raise OptionError(f"{called} returned {raw.dtype}; wanted torch.float32", hint="end it with .float()")


def runs_in_double(source: Source) -> bool:
    """Whether the network leaves float64 alone; some cast to float32 inside."""
    x, label, extra = example(source, torch.float64)
    try:
        with torch.inference_mode():
            return bool(copy.deepcopy(source.net).double()(x, label, *extra).dtype == torch.float64)
    except RuntimeError:
        return False


def example(source: Source, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Inputs for two images: zeros."""
    extra = [torch.zeros(2, dtype=getattr(torch, declared["dtype"])) for declared in source.conditions.values()]
    return torch.zeros(2, source.channels, source.height, source.width, dtype=dtype), torch.ones(2, dtype=dtype), extra


def at_another_size(graph: Graph, candidate: Any, sde: Sde) -> verify.Evaluation:
    """One comparison at a size that is neither the network's own nor square. Raises OptionError where it cannot run."""
    image = graph.metadata["image"]
    step = image.get("multiple", 1)
    width, height = image["width"] + 2 * step, image["height"] + step
    t = next(t for t in (0.35, 0.05, 0.001) if sde.sigma(t) < np.inf)
    sigma = sde.sigma([t]).astype(np.float32)
    shape = (1, image["channels"], height, width)
    x = (1 + sigma) * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    try:
        wanted, found = (bind(1, size=(width, height))(x, sigma) for bind in (graph.reference, candidate))
        error = verify.relative_error(x[0], wanted[0], found[0])
    except Exception as error_:  # of the network, in PyTorch or in ONNX Runtime
        raise OptionError(
            f"the network does not run at {width}x{height}: {summary_of(error_)}",
            hint="leave --dynamic out, or say with --multiple which sizes it takes",
        ) from error_
    return verify.Evaluation(f"{width}x{height}", t, float(sigma[0]), error)


def summary_of(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def tool_versions() -> dict[str, str]:
    return {"torch": torch.__version__, "onnx": onnx.__version__, "sdedit_engine": __version__}
