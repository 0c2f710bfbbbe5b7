"""A plan for Triton Inference Server's TensorRT backend: the denoiser D(x; σ), one evaluation a request.

    REPO/NAME/config.pbtxt      the model's configuration, inference.ModelConfig as protobuf text
    REPO/NAME/1/model.plan      the plan, as `sdedit build` wrote it

The denoiser and not the whole edit: TensorRT has no integer Philox, so an edit in a plan would take its noise as an
input, steps x picture of it with every request (79 MB for 100 steps at 256x256), and one plan would serve one number of
steps. So the client runs the loop: the rows of `sdedit inspect --json --t0 … --steps …`, noise from sdedit.h, and one
request a step. For whole edits in one request serve the ONNX file (sdedit.export.triton).

Requests carry the batch first: x [B, C, H, W], sigma [B, 1], further inputs [B, 1]; the answer is denoised. A plan
loads only where Triton has the version of TensorRT that built it, on the kind of GPU it was built for.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdedit.artifact import Artifact
from sdedit.errors import ArtifactError, OptionError
from sdedit.export import triton_repository
from sdedit.export.triton_repository import PLAN, Word, to_text

LIBRARY = "tensorrt"  # the only one that Triton's backend links
PARAMETER = "sdedit_plan"
QUEUE_DELAY_US = 200  # a step waits for others; an edit is many
TYPES = {
    "bool": "TYPE_BOOL", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "uint8": "TYPE_UINT8",
}  # fmt: skip


def write(
    plan: Path, sidecar: Mapping[str, Any], opened: Artifact, repository: Path, *, name: str | None = None,
    force: bool = False,
) -> Path:  # fmt: skip
    """Write the model's folder, whole or not at all, and return it. sidecar: of the plan, checked.

    name: the model's in Triton (default: the artifact's). Raises ArtifactError, OptionError, OutputError.
    """
    built_by, (least, _, most) = sidecar["library"]["name"], sidecar["profile"]["batch"]
    if built_by != LIBRARY:
        raise ArtifactError(
            f"{plan}: was built by {built_by}, whose plans Triton's TensorRT backend does not load",
            hint="sdedit build MODEL.onnx --backend tensorrt, or sdedit export --triton REPO MODEL.onnx",
        )
    if least != 1:
        raise OptionError(
            f"{plan}: was built for batches of {least} to {most}; Triton calls it with any from 1 on",
            hint=f"sdedit build --batch 1:{most}:{most} MODEL.onnx",
        )
    name = opened.name if name is None else name

    def fill(folder: Path) -> str:
        shutil.copyfile(plan, folder / PLAN)
        return to_text(configuration(name, sidecar, (opened.channels, opened.height, opened.width)))

    return triton_repository.put(repository, name, fill, inputs=[plan], force=force)


def configuration(name: str, sidecar: Mapping[str, Any], frame: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of inference.ModelConfig for a plan, by name, from its sidecar. frame: (C, H, W), which is fixed."""
    _, tuned, most = sidecar["profile"]["batch"]
    config: dict[str, Any] = {
        "name": name,
        "platform": "tensorrt_plan",
        "max_batch_size": most,
        "input": [_tensor(one, frame) for one in sidecar["inputs"]],
        "output": [_tensor(one, frame) for one in sidecar["outputs"]],
        "instance_group": [{"kind": Word("KIND_GPU"), "count": 1}],
    }
    if most > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": sorted({max(2, tuned), most}),
            "max_queue_delay_microseconds": QUEUE_DELAY_US,
        }
    config["model_warmup"] = [
        {
            "name": f"batch-{batch}",
            "batch_size": batch,
            "inputs": [{"key": one["name"], "value": _sample(one, frame)} for one in sidecar["inputs"]],
        }
        for batch in sorted({1, most})
    ]
    config["parameters"] = [{"key": PARAMETER, "value": {"string_value": json.dumps(sidecar)}}]
    return config


def _tensor(tensor: Mapping[str, Any], frame: tuple[int, int, int]) -> dict[str, Any]:
    """What a request holds of it, one image; one value is [1], which Triton makes [B] of the batch."""
    described = {"name": tensor["name"], "data_type": _type(tensor), "dims": _dims(tensor, frame)}
    return described if _is_picture(tensor) else described | {"reshape": {"shape": []}}


def _sample(tensor: Mapping[str, Any], frame: tuple[int, int, int]) -> dict[str, Any]:
    """Zeros, of one image, to warm up with; nobody looks at what comes out."""
    return {"data_type": _type(tensor), "dims": _dims(tensor, frame), "zero_data": True}


def _dims(tensor: Mapping[str, Any], frame: tuple[int, int, int]) -> list[int]:
    return list(frame) if _is_picture(tensor) else [1]


def _is_picture(tensor: Mapping[str, Any]) -> bool:
    return tensor["name"] in ("x", "denoised")


def _type(tensor: Mapping[str, Any]) -> Word:
    return Word(TYPES[tensor["dtype"]])
