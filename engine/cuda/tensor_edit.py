"""The edit of tensors that lie on the GPU already, for hosts that keep them there."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from sdedit.artifact import Artifact
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver
from sdedit.cuda.interop import GpuTensor, GpuView, stream_handle
from sdedit.editor import EditOptions
from sdedit.errors import OptionError
from sdedit.noise import result_seed
from sdedit.schedule import plan


class GpuBackend(Protocol):
    """A backend whose network runs on the GPU."""

    @property
    def driver(self) -> Driver:
        """What calls CUDA."""
        ...

    def network(self, batch: int, conditions: Mapping[str, float]) -> DeviceNetwork:
        """The network by itself, for batches of this size."""
        ...

    def device_loop(
        self, batch: int, conditions: Mapping[str, float], stream: int | None
    ) -> AbstractContextManager[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block."""
        ...


def edit_tensor(
    backend: GpuBackend, artifact: Artifact, guide: Any, mask: Any, stream: Any, options: EditOptions
) -> GpuTensor:
    """See sdedit.Editor.edit_tensor."""
    driver, handle = backend.driver, stream_handle(stream)
    if handle is not None and not driver.takes_any_stream:
        raise OptionError(f"{driver.name} cannot use a stream of the caller's", hint="set SDEDIT_CUDA=cuda-core")
    frame = artifact.height, artifact.width
    view = GpuView(guide, (None, artifact.channels, *frame), "guide", handle or 1)
    batch = view.shape[0]
    masked = None if mask is None else GpuView(mask, (batch, 1, *frame), "mask", handle or 1)
    chosen = replace(options, batch=batch).resolved(artifact.defaults)
    table = plan(artifact.sde, **chosen.schedule())
    seeds = [result_seed(chosen.seed, j) for j in range(batch)]
    with driver.current(), backend.device_loop(batch, chosen.conditions, handle) as loop:
        where = None if masked is None else masked.pointer
        x = loop.start(view.pointer, where, seeds, table, repeats=chosen.repeats)
        result = _copied(driver, x, loop)
        if handle is None:
            loop.finish(table)
    return result


def _copied(driver: Driver, x: int, loop: DeviceLoop) -> GpuTensor:
    """The result in memory of its own: the loop's is used again."""
    nbytes = 4 * loop.shape[0] * loop.shape[1] * loop.shape[2] * loop.shape[3]
    pointer = driver.allocate(nbytes)
    driver.copy(pointer, x, nbytes, loop.stream)

    def free() -> None:
        with driver.current():
            driver.free(pointer)

    return GpuTensor(pointer, loop.shape, loop.stream, free)
