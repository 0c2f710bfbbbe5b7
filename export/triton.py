"""A model repository of Triton Inference Server: the whole edit as one ONNX file, served by the onnxruntime backend.

    REPO/NAME/config.pbtxt      the model's configuration, inference.ModelConfig as protobuf text
    REPO/NAME/1/model.onnx      the edit, as sdedit.export.loop_graph writes it; model.onnx.data where weights need it

Requests carry the batch first: guide [B, H, W, C] (or float32 [B, C, H, W]), where asked mask, seed [B, 1]; the answer
is image. Triton puts requests together along that dimension, up to max_batch_size; an image is the same alone or in any
batch. A request's shapes never lack a dimension, so that one value an image is [B, 1] in it, and `reshape` makes it the
[B] of the graph. Everything about tensors is read from the written graph, so the two files cannot disagree.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, ValueInfoProto

from sdedit.artifact import Artifact
from sdedit.errors import OptionError
from sdedit.export import loop_graph, triton_repository
from sdedit.export.triton_repository import GRAPH, Word, to_text

MAX_BATCH = 8
LARGEST_BATCH = 2**31 - 1  # an int32 of the schema
QUEUE_DELAY_US = 5000  # little beside an edit, which is many evaluations of the network
TYPES = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
}


def write(
    opened: Artifact,
    repository: Path,
    schedule: Mapping[str, Any],
    *,
    name: str | None = None,
    max_batch: int = MAX_BATCH,
    repeats: int = 1,
    mask: bool = False,
    guide: str = "uint8",
    force: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Write the model's folder, whole or not at all. Returns it, and the metadata of the edit in it.

    repository: made if its parent exists. schedule: the keywords of sdedit.plan. name: the model's in Triton (default:
    the artifact's). Raises OptionError, OutputError.
    """
    if not 1 <= max_batch <= LARGEST_BATCH:
        raise OptionError(f"max-batch is {max_batch}; wanted 1 to {LARGEST_BATCH}", hint=f"--max-batch {MAX_BATCH}")
    name = opened.name if name is None else name
    metadata: dict[str, Any] = {}

    def fill(folder: Path) -> str:
        metadata.update(loop_graph.write(opened, folder / GRAPH, schedule, repeats=repeats, mask=mask, guide=guide))
        edit = onnx.load(folder / GRAPH, load_external_data=False)
        frame = {"H": opened.height, "W": opened.width}
        return to_text(configuration(name, edit, metadata, max_batch, frame))

    target = triton_repository.put(repository, name, fill, inputs=[opened.path], force=force)
    return target, metadata


# --- config.pbtxt ----------------------------------------------------------------------------------------------------


def configuration(
    name: str, edit: onnx.ModelProto, metadata: Mapping[str, Any], max_batch: int, frame: Mapping[str, int]
) -> dict[str, Any]:
    """The fields of inference.ModelConfig for an edit, by name. frame: the size to warm up with where any is taken."""
    inputs, (image,) = edit.graph.input, edit.graph.output
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": [_tensor(tensor) for tensor in inputs],
        "output": [_tensor(image)],
        "instance_group": [{"kind": Word("KIND_AUTO"), "count": 1}],
    }
    if max_batch > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": sorted({max(2, max_batch // 2), max_batch}),
            "max_queue_delay_microseconds": QUEUE_DELAY_US,
        }
    samples = {tensor.name: _sample(tensor, frame) for tensor in inputs}
    config["model_warmup"] = [
        {
            "name": f"batch-{batch}",
            "batch_size": batch,
            "inputs": [{"key": key, "value": value} for key, value in samples.items()],
        }
        for batch in sorted({1, max_batch})
    ]
    config["parameters"] = [{"key": loop_graph.PROPERTY, "value": {"string_value": json.dumps(metadata)}}]
    return config


def _tensor(tensor: ValueInfoProto) -> dict[str, Any]:
    """What a request holds of it, one image: any size is -1; one value is [1], which Triton makes [B] of the batch."""
    dims = [size if isinstance(size, int) else -1 for size in _sizes(tensor)]
    described = {"name": tensor.name, "data_type": _type(tensor), "dims": dims or [1]}
    return described if dims else described | {"reshape": {"shape": []}}


def _sample(tensor: ValueInfoProto, frame: Mapping[str, int]) -> dict[str, Any]:
    """Zeros, of one image, to warm up with."""
    dims = [size if isinstance(size, int) else frame[size] for size in _sizes(tensor)]
    return {"data_type": _type(tensor), "dims": dims or [1], "zero_data": True}


def _sizes(tensor: ValueInfoProto) -> list[int | str]:
    """Its dimensions after the batch, by name where any size is taken."""
    _batch, *dims = tensor.type.tensor_type.shape.dim
    return [one.dim_value if one.HasField("dim_value") else one.dim_param for one in dims]


def _type(tensor: ValueInfoProto) -> Word:
    return Word(TYPES[tensor.type.tensor_type.elem_type])
