"""An ONNX denoiser that someone else made, with our conventions written around its graph.

What stands before the network and what follows it are the modules of denoiser.py, traced by themselves: one
statement of the conventions serves checkpoints and foreign graphs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import nn

from sdedit import artifact
from sdedit.errors import ArtifactError, OptionError
from sdedit.export import schedules, to_onnx
from sdedit.export.checkpoints import provenance
from sdedit.export.denoiser import After, Before, Convention, Denoiser
from sdedit.export.exporting import Graph, summary_of, tool_versions, torch_reference
from sdedit.export.graph import OPSETS, add_prefix, set_opset

TIME_TYPES = {TensorProto.FLOAT: torch.float32, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32}


@dataclass(frozen=True)
class Interface:
    """Which of the graph's tensors are which. None: the only one, or the first and second input."""

    inputs: Sequence[str] | None = None  # noisy image, time label
    output: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)  # further inputs, folded in


def wrap(
    path: Path, interface: Interface, convention: Convention, size: tuple[int, int] | None, name: str | None
) -> Graph:
    """The foreign graph as D(x; σ). size: (height, width), needed where the graph leaves them open."""
    model = _read(path)
    image_name, time_name = _inputs(path, model, interface)
    fold_constants(path, model, interface.constants, keep=(image_name, time_name))
    image, time = (_value(model.graph.input, n) for n in (image_name, time_name))
    result = _output(path, model, interface)
    channels, height, width = _frame(path, image, size)
    _check_time(path, time)
    if to_onnx.opset_of(model) not in OPSETS:
        model = set_opset(model, to_onnx.OPSET)
    opset = to_onnx.opset_of(model)

    x, sigma = ("x", torch.zeros(2, channels, height, width)), ("sigma", torch.ones(2))
    try:
        net = _Session(model, (image_name, time_name), result, time)
        raw = net(torch.zeros(3, channels, height, width), torch.ones(3))
        before = _trace(_BeforeGraph(convention, time), [x, sigma], ["scaled", "label"], opset)
        after = _trace(After(convention), [x, sigma, ("raw", x[1])], ["denoised"], opset)
        joined = _join(before, model, after, image_name, time_name, result)
    except Exception as error:  # of ONNX Runtime, of onnx's compose, dozens of kinds
        raise ArtifactError(
            f"{path}: cannot be wrapped: {summary_of(error)}",
            hint="does it run in ONNX Runtime, for a batch of three, with these inputs?",
        ) from error
    if list(raw.shape) not in ([3, c, height, width] for c in (channels, 2 * channels)) or raw.dtype != torch.float32:
        raise OptionError(
            f"{path}: output {result!r} is {raw.dtype} {list(raw.shape)} for three images; wanted float32 "
            f"{[3, channels, height, width]}, or twice the channels with a learned variance",
            hint="--inputs IMAGE,TIME and --output-name NAME choose the tensors",
        )
    dims = joined.graph.output[0].type.tensor_type.shape.dim
    for dimension, value in zip(dims[1:], (channels, height, width), strict=True):
        dimension.dim_value = value
    metadata: dict[str, Any] = {
        "format": artifact.FORMAT,
        "name": name or path.stem,
        "image": {"channels": channels, "height": height, "width": width},
        "sde": schedules.as_metadata(convention.sde),
        "precision": "fp32",
        "source": {"family": "onnx", **provenance(path), "producer": model.producer_name, **tool_versions()},
    }
    reference = torch_reference(Denoiser(net, convention), {}, {}, double=False)
    return Graph(joined, reference, metadata, f"{path.name} in ONNX Runtime, conventions in PyTorch")


class _Session(nn.Module):
    """The foreign graph, run by ONNX Runtime, as a torch module: net(scaled, label) -> raw."""

    def __init__(self, model: onnx.ModelProto, inputs: tuple[str, str], output: str, time: onnx.ValueInfoProto) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.inputs, self.output, self.time = inputs, output, time

    def forward(self, scaled: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        given = scaled.numpy(), _as_declared(self.time, label).numpy()
        return torch.from_numpy(self.session.run([self.output], dict(zip(self.inputs, given, strict=True)))[0])


class _BeforeGraph(Before):
    """Before, with the time label as the graph declares it."""

    def __init__(self, convention: Convention, time: onnx.ValueInfoProto) -> None:
        super().__init__(convention)
        self.time = time

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, label = super().forward(x, sigma)
        return scaled, _as_declared(self.time, label)


def _as_declared(time: onnx.ValueInfoProto, label: torch.Tensor) -> torch.Tensor:
    """Labels (B,) in the type and rank of this input, rounded for an integer."""
    dtype = TIME_TYPES[time.type.tensor_type.elem_type]
    return (label if dtype.is_floating_point else label.round()).to(dtype).reshape(-1, *[1] * (len(_dims(time)) - 1))


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's and onnx's own kinds
        raise ArtifactError(f"{path}: not an ONNX file: {error}", hint="name the .onnx file") from error


def _inputs(path: Path, model: onnx.ModelProto, interface: Interface) -> tuple[str, str]:
    weights = {weight.name for weight in model.graph.initializer}
    present = [value.name for value in model.graph.input if value.name not in weights]
    if interface.inputs is not None:
        if unknown := [name for name in interface.inputs if name not in present]:
            raise OptionError(f"{path} has no input {unknown[0]!r}", hint=f"its inputs are {', '.join(present)}")
        if len(interface.inputs) != 2:
            raise OptionError(
                f"--inputs names {len(interface.inputs)} inputs; wanted the noisy image and the time label",
                hint=f"--inputs {','.join(present[:2])}",
            )
        return tuple(interface.inputs)  # type: ignore[return-value]
    free = [name for name in present if name not in interface.constants]
    if len(free) != 2:
        raise OptionError(
            f"{path} has the inputs {', '.join(present)}; which are the noisy image and the time label is not said",
            hint="--inputs IMAGE,TIME, and --constant NAME=VALUE for each of the others",
        )
    ranks = {name: len(_dims(_value(model.graph.input, name))) for name in free}
    image, time = sorted(free, key=lambda name: -ranks[name])
    return image, time


def fold_constants(path: Path, model: onnx.ModelProto, constants: Mapping[str, float], keep: Sequence[str]) -> None:
    """Turn every further input into an initializer that broadcasts over the batch."""
    graph = model.graph
    weights = {weight.name for weight in graph.initializer}
    further = [value for value in graph.input if value.name not in weights and value.name not in keep]
    if unknown := [name for name in constants if name not in {value.name for value in further}]:
        raise OptionError(f"{path} has no input {unknown[0]!r} to fold", hint="leave that --constant out")
    for value in further:
        if value.name not in constants:
            raise OptionError(
                f"{path} has a further input {value.name!r} and no value for it", hint=f"--constant {value.name}=0"
            )
        sizes = [dimension.dim_value or 1 for dimension in _dims(value)]
        if any(not dimension.dim_value for dimension in list(_dims(value))[1:]):
            raise OptionError(
                f"{path}: input {value.name!r} has sizes it does not say", hint="export it with fixed sizes"
            )
        graph.input.remove(value)
        graph.initializer.append(
            numpy_helper.from_array(_filled(path, value, sizes, constants[value.name]), value.name)
        )


def _filled(path: Path, value: onnx.ValueInfoProto, sizes: list[int], number: float) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    try:
        with np.errstate(all="ignore"):
            filled = np.full(sizes, number).astype(dtype)
            exact = np.issubdtype(dtype, np.floating) or bool(np.all(filled == number))
    except (TypeError, ValueError):
        exact = False
    if not exact or not np.isfinite(number):
        raise OptionError(f"{path}: input {value.name!r} is {dtype} and cannot be {number:g}", hint="--constant NAME=0")
    return filled


def _output(path: Path, model: onnx.ModelProto, interface: Interface) -> str:
    names = [value.name for value in model.graph.output]
    if interface.output is not None:
        if interface.output not in names:
            raise OptionError(f"{path} has no output {interface.output!r}", hint=f"its outputs are {', '.join(names)}")
        return interface.output
    if len(names) != 1:
        raise OptionError(f"{path} has the outputs {', '.join(names)}", hint=f"--output-name {names[0]}")
    return names[0]


def _frame(path: Path, image: onnx.ValueInfoProto, size: tuple[int, int] | None) -> tuple[int, int, int]:
    dims = _dims(image)
    if len(dims) != 4 or image.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise OptionError(
            f"{path}: input {image.name!r} is not a float32 image batch of rank 4", hint="--inputs IMAGE,TIME"
        )
    if dims[0].dim_value:
        raise OptionError(
            f"{path}: input {image.name!r} has a fixed batch of {dims[0].dim_value}",
            hint="export it with a dynamic batch",
        )
    found = [d.dim_value for d in dims[1:]]
    if size is not None and any(f and f != s for f, s in zip(found[1:], size, strict=True)):
        raise OptionError(f"{path}: is fixed to {found[1]} x {found[2]}", hint="leave --size out")
    if not found[0] or (size is None and not all(found[1:])):
        raise OptionError(
            f"{path}: input {image.name!r} leaves its {'channels' if not found[0] else 'size'} open",
            hint="--size 256" if found[0] else "export it with fixed channels",
        )
    height, width = size or found[1:]
    return found[0], height, width


def _check_time(path: Path, time: onnx.ValueInfoProto) -> None:
    dims = _dims(time)
    if not dims or dims[0].dim_value or any(d.dim_value != 1 for d in dims[1:]):
        raise OptionError(
            f"{path}: input {time.name!r} is not one time label an image, [B] or [B, 1]",
            hint="export it with a dynamic batch, also in the time input",
        )
    if time.type.tensor_type.elem_type not in TIME_TYPES:
        raise OptionError(f"{path}: input {time.name!r} is neither float32 nor an integer", hint="--inputs IMAGE,TIME")


def _trace(
    module: nn.Module, inputs: Sequence[tuple[str, torch.Tensor]], outputs: Sequence[str], opset: int
) -> onnx.ModelProto:
    """A small module as a graph of the foreign one's opset."""
    traced = to_onnx.trace_module(module, inputs, outputs, opset=min(opset, max(to_onnx.TRACED_OPSETS)))
    return set_opset(traced, opset)


def _join(
    before: onnx.ModelProto, model: onnx.ModelProto, after: onnx.ModelProto, image: str, time: str, output: str
) -> onnx.ModelProto:
    """before -> model -> after, with x and sigma going to both ends."""
    ir = max(m.ir_version for m in (before, model, after))
    for part in (before, model, after):
        part.ir_version = ir
    first = compose.merge_models(
        add_prefix(before, "before."), add_prefix(model, "net."),
        io_map=[("before.scaled", f"net.{image}"), ("before.label", f"net.{time}")], outputs=[f"net.{output}"],
    )  # fmt: skip
    joined = compose.merge_models(
        first, add_prefix(after, "after."), io_map=[(f"net.{output}", "after.raw")]
    )  # fmt: skip
    rename = {"before.x": "x", "after.x": "x", "before.sigma": "sigma", "after.sigma": "sigma",
              "after.denoised": "denoised"}  # fmt: skip
    graph = joined.graph
    for node in graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.name = rename.get(value.name, value.name)
    kept = {value.name: value for value in graph.input}
    del graph.input[:]
    graph.input.extend(kept[name] for name in ("x", "sigma"))
    del joined.metadata_props[:]
    return joined


def _value(values: Any, name: str) -> onnx.ValueInfoProto:
    return next(value for value in values if value.name == name)


def _dims(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim
