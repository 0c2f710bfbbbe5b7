"""The edit of tensors that lie on the GPU already, for hosts that keep them there."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sdedit.artifact import Artifact
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver
from sdedit.cuda.interop import GpuTensor, GpuView, stream_handle
from sdedit.errors import OptionError
from sdedit.executor import Batch
from sdedit.options import EditOptions
from sdedit.tensors import batch_of

log = logging.getLogger(__name__)


class GpuBackend(Protocol):
    """A backend whose network runs on the GPU."""

    @property
    def driver(self) -> Driver:
        """What calls CUDA."""
        ...

    def network(self, batch: int) -> DeviceNetwork:
        """The network by itself, for batches of this size. Wants the context current."""
        ...

    def device_loop(self, batch: int, conditions: Mapping[str, float]) -> AbstractContextManager[DeviceLoop]:
        """A loop for batches of this size, for the length of a `with` block. Wants the context current."""
        ...


def edit_tensor(
    backend: GpuBackend, artifact: Artifact, guide: Any, mask: Any, stream: Any, options: EditOptions
) -> GpuTensor:
    """See sdedit.Editor.edit_tensor."""
    driver, theirs = backend.driver, stream_handle(stream)
    if driver.graphs is None:
        raise OptionError(
            f"{driver.name} alone cannot order streams of other libraries", hint="pip install cuda-bindings"
        )
    view = GpuView(guide, (None, artifact.channels, artifact.height, artifact.width), "guide")
    batch = view.shape[0]
    masked = None if mask is None else GpuView(mask, (batch, 1, artifact.height, artifact.width), "mask")
    chosen, table, seeds = batch_of(batch, artifact, options)
    with driver.current(), backend.device_loop(batch, chosen.conditions) as loop:
        if theirs is not None:
            driver.graphs.follow(loop.stream, theirs)
        pointers = [None if one is None else one.ready_on(loop.stream, driver.graphs) for one in (view, masked)]
        assert pointers[0] is not None
        x = loop.start(Batch(pointers[0], pointers[1], seeds, table, chosen.repeats))
        result = _copied(driver, x, loop, theirs)
        if theirs is None:
            loop.finish(table)
        else:
            driver.graphs.follow(theirs, loop.stream)
        for note in loop.notes:
            log.info(note)
    return result


def _copied(driver: Driver, x: int, loop: DeviceLoop, stream: int | None) -> GpuTensor:
    """The result in memory of its own: the loop's is used again."""
    pointer = driver.allocate(loop.nbytes)

    def free() -> None:
        with driver.current():
            driver.free(pointer)

    result = GpuTensor(pointer, loop.shape, stream, driver.graphs, free)
    driver.copy(pointer, x, loop.nbytes, loop.stream)
    return result
