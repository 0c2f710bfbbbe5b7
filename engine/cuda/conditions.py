"""A network's further inputs on the GPU, at addresses that stay: a graph may be made of what reads them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np

from sdedit.artifact import ExtraInput
from sdedit.cuda.driver import Driver, Pinned


class Conditions:
    """One value for all images of a batch, of every input that an artifact declares. Wants the context current.

    bind: is told each one's name, address of (B,) and element type.
    """

    def __init__(
        self, driver: Driver, batch: int, extra: Mapping[str, ExtraInput], bind: Callable[[str, int, str], None]
    ) -> None:
        self._tensors: dict[str, tuple[int, str]] = {}
        self._driver, self._values = driver, dict[str, float]()
        self._host: dict[str, Pinned] = {}
        with ExitStack() as held:
            for name, declared in extra.items():
                nbytes = batch * np.dtype(declared.dtype).itemsize
                pointer, self._host[name] = driver.allocate(nbytes), driver.allocate_pinned(nbytes)
                held.callback(driver.free, pointer)
                held.callback(driver.free_pinned, self._host[name])
                self._tensors[name] = pointer, declared.dtype
                bind(name, pointer, declared.dtype)
            self._held = held.pop_all()

    def set(self, values: Mapping[str, float], stream: int) -> None:
        """For what is enqueued on the stream from here on."""
        if values == self._values:
            return
        for name, value in values.items():
            pointer, kind = self._tensors[name]
            self._host[name].view(kind)[:] = value
            self._driver.upload(pointer, self._host[name], stream)
        self._driver.synchronize(stream)
        self._values = dict(values)

    def close(self) -> None:
        self._host = {}
        self._held.close()
