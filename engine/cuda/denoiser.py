"""A network on the GPU as a denoiser of host arrays: for comparisons, and for loops of the caller's own."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress

import numpy as np
from numpy.typing import NDArray

from sdedit.cuda.device_loop import DeviceNetwork
from sdedit.cuda.driver import Driver
from sdedit.errors import DeviceError, NetworkError
from sdedit.loop import Array


class DeviceDenoiser:
    """(x (B, C, H, W), sigma (B,)) float32 -> D; copies x in and D out. Freed with its last reference."""

    def __init__(self, driver: Driver, network: DeviceNetwork, shape: tuple[int, int, int, int]) -> None:
        self._driver, self._network, self._shape = driver, network, shape
        frame = 4 * int(np.prod(shape))
        with driver.current(), ExitStack() as held:
            held.callback(network.close)
            self._stream = driver.make_stream() if network.stream is None else network.stream
            if network.stream is None:
                held.callback(driver.free_stream, self._stream)

            def allocate(nbytes: int) -> tuple[int, NDArray[np.float32]]:
                pointer, memory = driver.allocate(nbytes), driver.allocate_pinned(nbytes)
                held.callback(driver.free, pointer)
                held.callback(driver.free_pinned, memory)
                return pointer, memory.view(np.float32)

            self._x, frame_memory = allocate(frame)
            self._denoised, _ = allocate(frame)
            self._sigma, self._level = allocate(4 * shape[0])
            self._frame = frame_memory.reshape(shape)
            network.bind(self._x, self._sigma, self._denoised)
            self._held = held.pop_all()

    def set_conditions(self, values: Mapping[str, float]) -> None:
        """The values of the network's further inputs, for every later call. Wants the context current."""
        self._network.set_conditions(values, self._stream)

    def __call__(self, x: Array, sigma: Array) -> Array:
        if x.shape != self._shape:
            raise NetworkError(f"x is {x.shape}; bound for {self._shape}", hint="bind the backend for this batch size")
        self._frame[:], self._level[:] = x, sigma
        with self._driver.current():
            self._driver.upload(self._x, self._frame, self._stream)
            self._driver.upload(self._sigma, self._level, self._stream)
            self._network.enqueue(self._stream)
            self._driver.download(self._frame, self._denoised, self._stream)
            self._driver.synchronize(self._stream)
        return self._frame.copy()  # which outlives the buffers

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            with suppress(DeviceError), self._driver.current():
                self._driver.synchronize(self._stream)
                self._held.close()
