"""From a torch module D(x; σ) to an ONNX graph, and from a graph to an artifact on disk."""

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from sdedit import artifact

OPSET = 18
TRACED_OPSETS = range(18, 21)  # what torch's tracing exporter writes
SMALLEST_HALVED = 1024  # elements; shorter weights stay float32
LARGEST_FILE = 2**31 - 2**24  # protobuf ends at 2 GiB: larger models keep their weights beside the file


def trace(
    denoiser: nn.Module,
    shape: tuple[int, int, int],
    conditions: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    opset: int = OPSET,
    dynamic: bool = False,
) -> onnx.ModelProto:
    """D(x; σ) as a float32 graph with dynamic batch; with dynamic height and width too where asked.

    denoiser: (x (B, C, H, W), sigma (B,), *conditions (B,)) -> (B, C, H, W). shape: (C, H, W).
    """
    conditions = conditions or {}
    inputs = [("x", torch.zeros(2, *shape)), ("sigma", torch.ones(2))]
    inputs += [(name, torch.zeros(2, dtype=getattr(torch, given["dtype"]))) for name, given in conditions.items()]
    model = trace_module(denoiser, inputs, ["denoised"], opset=opset, free_size=("x", "denoised") if dynamic else ())
    for dimension, size in zip(model.graph.output[0].type.tensor_type.shape.dim[1:], shape, strict=True):
        if not dynamic:
            dimension.dim_value = size
    return model


def trace_module(
    module: nn.Module,
    inputs: Sequence[tuple[str, torch.Tensor]],
    outputs: Sequence[str],
    *,
    opset: int,
    free_size: Sequence[str] = (),
) -> onnx.ModelProto:
    """A module as a graph whose tensors all begin with the batch; those in `free_size` have any H and W too."""
    axes = {name: {0: "B"} for name in (*(name for name, _ in inputs), *outputs)}
    for name in free_size:
        axes[name] |= {2: "H", 3: "W"}
    quiet = contextlib.redirect_stdout(io.StringIO())  # it prints the graph when it fails
    with quiet, warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # it is deprecated; and shapes it takes as constants are constants
        path = os.path.join(scratch, "traced.onnx")  # a file, since beyond 2 GiB it writes several
        torch.onnx.export(
            module.eval(),
            tuple(example for _, example in inputs),
            path,
            input_names=[name for name, _ in inputs],
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,  # small static graphs, and no further packages
        )
        model = onnx.load(path)
    told = {tensor.name for tensor in model.graph.input}
    for name, example in inputs:  # what the module does not use is an input all the same
        if name not in told:
            kind = helper.np_dtype_to_tensor_dtype(example.numpy().dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, ["B", *example.shape[1:]]))
    return model


def opset_of(model: onnx.ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Write the artifact, its weights beside it in PATH.data where one file cannot hold them. The files written.

    The model's own weights are gone afterwards where they went beside the file.
    """
    files = write(model, path, {"sdedit": json.dumps(metadata)})
    artifact.read(path)  # what we write, we can read
    return files


def write(model: onnx.ModelProto, path: Path, properties: Mapping[str, str]) -> list[Path]:
    """As `save`, any graph with any metadata properties."""
    helper.set_model_props(model, properties)
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # onnx would append to it
    large = sum(len(weight.raw_data) for weight in weights_of(model.graph)) > LARGEST_FILE
    onnx.save_model(model, path, save_as_external_data=large, location=beside.name, size_threshold=128)
    onnx.checker.check_model(str(path), full_check=not large)
    return [path, beside] if large else [path]


def weights_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of the bodies of its control flow."""
    yield from graph.initializer
    for node in graph.node:
        for body in bodies(node):
            yield from weights_of(body)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs of a node's control flow."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def replace_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Give an artifact on disk other metadata; its external data stays where it is."""
    model = onnx.load(path, load_external_data=False)
    helper.set_model_props(model, {"sdedit": json.dumps(metadata)})
    onnx.save(model, path)


def write_artifact(denoiser: nn.Module, path: Path, metadata: dict[str, Any], *, half_weights: bool = False) -> None:
    """Trace D(x; σ) and write it, unverified. metadata: the `sdedit` object.

    half_weights stores large weights as float16 behind a Cast, which runtimes fold away when they load:
    half the file, computed in float32.
    """
    size = metadata["image"]
    model = trace(denoiser, (size["channels"], size["height"], size["width"]))
    if half_weights:
        halve_weights(model)
    with tempfile.TemporaryDirectory(prefix=".sdedit-", dir=path.parent) as scratch:
        for file in save(model, Path(scratch) / path.name, metadata):
            os.replace(file, path.with_name(file.name))


def halve_weights(model: onnx.ModelProto) -> None:
    """Store every large float32 initializer as float16, with a Cast back in front of its users."""
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= SMALLEST_HALVED:
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise ValueError(f"{weight.name} has values beyond float16")
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
