"""Artifacts whose denoiser is known in closed form, made with onnx alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SDES: dict[str, dict[str, Any]] = {
    "ve": {"kind": "ve", "sigma_min": 0.02, "sigma_max": 60.0},
    "vp": {"kind": "vp", "beta_min": 0.1, "beta_max": 20.0},
    "vp-discrete": {
        "kind": "vp-discrete",
        "alphas_cumprod": np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist(),
    },
    "edm": {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
}

Nodes = list[onnx.NodeProto]


def metadata(shape: tuple[int, int, int], sde: dict[str, Any], **extra: Any) -> dict[str, Any]:
    image = {"channels": shape[0], "height": shape[1], "width": shape[2]}
    return {"format": 1, "name": "closed-form", "image": image, "sde": sde, "precision": "fp32", **extra}


def save(
    path: Path,
    nodes: Nodes,
    weights: dict[str, np.ndarray],
    described: Any,
    *,
    shape: tuple[int, int, int] = (3, 16, 16),
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
    outputs: dict[str, tuple[int, list[Any]]] | None = None,
    opset: int = 18,
) -> Path:
    """Write nodes as an ONNX file. `described` is the metadata: an object, a string as it is, or None for none."""
    inputs = inputs or {"x": (TensorProto.FLOAT, ["B", *shape]), "sigma": (TensorProto.FLOAT, ["B"])}
    outputs = outputs or {"denoised": (TensorProto.FLOAT, ["B", *shape])}
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [helper.make_tensor_value_info(n, *spec) for n, spec in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if described is not None:
        helper.set_model_props(model, {"sdedit": described if isinstance(described, str) else json.dumps(described)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def gaussian(
    path: Path, sde: dict[str, Any], mean: np.ndarray, std: float, **extra: Any
) -> tuple[Path, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """D = the posterior mean of N(mean, std² I): (std² x + σ² mean)/(std² + σ²), and the same in float64."""
    shape = mean.shape
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Mul", ["s", "s"], ["s2"]),
        helper.make_node("Add", ["s2", "v"], ["total"]),
        helper.make_node("Mul", ["x", "v"], ["vx"]),
        helper.make_node("Mul", ["s2", "mean"], ["sm"]),
        helper.make_node("Add", ["vx", "sm"], ["sum"]),
        helper.make_node("Div", ["sum", "total"], ["denoised"]),
    ]
    weights = {
        "column": np.array([-1, 1, 1, 1], np.int64),
        "v": np.array(std**2, np.float32),
        "mean": mean[None].astype(np.float32),
    }
    save(path, nodes, weights, metadata(shape, sde, **extra), shape=shape)

    def exact(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        s2 = np.reshape(np.asarray(sigma, np.float64) ** 2, (-1, 1, 1, 1))
        return (std**2 * x + s2 * mean.astype(np.float32)) / (std**2 + s2)

    return path, exact


def identity(path: Path, sde: dict[str, Any], shape: tuple[int, int, int] = (3, 16, 16), **extra: Any) -> Path:
    """D = x: whatever goes in is called clean."""
    return save(
        path, [helper.make_node("Identity", ["x"], ["denoised"])], {}, metadata(shape, sde, **extra), shape=shape
    )
