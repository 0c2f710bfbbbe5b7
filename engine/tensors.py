"""Edits of float tensors as they are, without pictures, where the network runs. Here: what all share, and the CPU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdedit.artifact import Artifact
from sdedit.backends import Backend
from sdedit.errors import ImageError, OptionError
from sdedit.executor import Batch
from sdedit.noise import result_seed
from sdedit.options import EditOptions, make_options
from sdedit.schedule import StepTable, plan

if TYPE_CHECKING:
    from sdedit.cuda.interop import GpuTensor

ALLOWED = ("t0", "steps", "sampler", "eta", "spacing", "seed", "repeats", "conditions")
KIND_CPU = 1  # DLDeviceType kDLCPU


def edit_tensor(
    backend: Backend, artifact: Artifact, guide: Any, mask: Any, stream: Any, options: Mapping[str, Any]
) -> "GpuTensor | NDArray[np.float32]":
    """See sdedit.Editor.edit_tensor."""
    if unknown := set(options) - set(ALLOWED):
        raise OptionError(
            f"unknown option {', '.join(sorted(unknown))}", hint=f"tensors are edited with {', '.join(ALLOWED)}"
        )
    chosen = make_options(options)
    gpu = backend.on_gpu()
    if gpu is not None:
        from sdedit.cuda import tensor_edit

        return tensor_edit.edit_tensor(gpu, artifact, guide, mask, stream, chosen)
    if stream is not None:
        raise OptionError(f"stream is given; {backend.name} runs on the CPU", hint="leave it out")
    return _edit_on_host(backend, artifact, guide, mask, chosen)


def batch_of(count: int, artifact: Artifact, options: EditOptions) -> tuple[EditOptions, StepTable, list[int]]:
    """For `count` images: the options as resolved, the step table, and the seeds. Raises OptionError."""
    chosen = replace(options, batch=count).resolved(artifact.defaults)
    return chosen, plan(artifact.sde, **chosen.schedule()), [result_seed(chosen.seed, j) for j in range(count)]


def require_shape(found: tuple[int, ...], wanted: tuple[int | None, ...], role: str) -> None:
    """Raise ImageError for a tensor of another shape than `wanted`, whose None is any length, B."""
    if len(found) == len(wanted) and all(w in (None, f) for w, f in zip(wanted, found, strict=True)):
        return
    shown = ", ".join("B" if side is None else str(side) for side in wanted)
    raise ImageError(
        f"the {role} is {found}; wanted ({shown})", hint="edit() resizes; a tensor has the model's size already"
    )


def _edit_on_host(
    backend: Backend, artifact: Artifact, guide: Any, mask: Any, options: EditOptions
) -> NDArray[np.float32]:
    frame = artifact.height, artifact.width
    given = _host_array(guide, (None, artifact.channels, *frame), (-1, 1), "guide")
    masked = None if mask is None else _host_array(mask, (len(given), 1, *frame), (0, 1), "mask")
    if not np.isfinite(given).all():
        raise ImageError("the guide holds NaN or Inf", hint="guides are in [-1, 1]")
    if masked is not None and not ((masked >= 0) & (masked <= 1)).all():
        raise ImageError("the mask leaves [0, 1]", hint="1 repaints, 0 keeps")
    chosen, table, seeds = batch_of(len(given), artifact, options)
    with backend.executor(chosen.batch, chosen.conditions) as executor:
        x, _ = executor.run(Batch(given, masked, seeds, table, chosen.repeats), None)
    return np.asarray(x, np.float32)  # as it is: the loop made it, and keeps none


def _host_array(tensor: Any, shape: tuple[int | None, ...], interval: tuple[int, int], role: str) -> NDArray[Any]:
    """Another library's tensor as a NumPy array of the same memory, which nothing writes to. Raises ImageError."""
    where = "pass one with __array_interface__ or __dlpack__; edit() takes files, pictures and uint8 arrays"
    try:
        on_cpu = int(tensor.__dlpack_device__()[0]) == KIND_CPU if hasattr(tensor, "__dlpack_device__") else None
        if on_cpu is False or (on_cpu is None and hasattr(tensor, "__cuda_array_interface__")):
            raise ImageError(
                f"the {role} is not on the CPU, where the network runs",
                hint="move it there, or load the model on a GPU: backend='tensorrt'",
            )
        if hasattr(tensor, "__array_interface__"):
            array: NDArray[Any] = np.asarray(tensor)
        elif on_cpu:
            array = np.from_dlpack(tensor)
        else:
            raise ImageError(f"the {role} is {type(tensor).__name__}; wanted a tensor", hint=where)
    except ImageError:
        raise
    except Exception as error:  # its library's own: a gradient, an element type that NumPy does not know
        raise ImageError(
            f"the {role} cannot be used: {error}", hint="pass tensor.detach(), float32 in C order"
        ) from error
    if array.dtype != np.float32:
        raise ImageError(
            f"the {role} is {array.dtype}; wanted float32", hint="convert it first, to [{}, {}]".format(*interval)
        )
    require_shape(array.shape, shape, role)
    if not array.flags.c_contiguous:
        raise ImageError(f"the {role} is not contiguous", hint="pass it in C order: B, C, H, W")
    return array
