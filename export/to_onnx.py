"""Write a denoiser as an artifact: one ordinary .onnx file with our metadata."""

import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from sdedit import artifact

OPSET = 18
SMALLEST_HALVED = 1024  # elements; shorter weights stay float32


def write_artifact(denoiser: nn.Module, path: Path, metadata: dict[str, Any], *, half_weights: bool = False) -> None:
    """Trace D(x; σ) and write it with dynamic batch.

    denoiser: (x (B, C, H, W), sigma (B,)) -> (B, C, H, W), float32. metadata: the `sdedit` object.
    half_weights stores large weights as float16 behind a Cast, which runtimes fold away when they load:
    half the file, computed in float32.
    """
    size = metadata["image"]
    x = torch.zeros(2, size["channels"], size["height"], size["width"])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the tracing exporter: small, static, no extra packages
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes it takes as constants are constants
        torch.onnx.export(
            denoiser.eval(),
            (x, torch.ones(2)),
            buffer,
            input_names=["x", "sigma"],
            output_names=["denoised"],
            dynamic_axes={name: {0: "B"} for name in ("x", "sigma", "denoised")},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    for dimension, name in zip(
        model.graph.output[0].type.tensor_type.shape.dim[1:], ("channels", "height", "width"), strict=True
    ):
        dimension.dim_value = size[name]
    if half_weights:
        halve_weights(model)
    helper.set_model_props(model, {"sdedit": json.dumps(metadata)})
    onnx.checker.check_model(model, full_check=True)
    partial = path.with_suffix(".partial")
    onnx.save(model, partial)
    artifact.read(partial)  # what we write, we can read
    os.replace(partial, path)


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
