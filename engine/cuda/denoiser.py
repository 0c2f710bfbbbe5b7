"""A network on the GPU as a denoiser of host arrays: for comparisons, and for loops of the caller's own."""

import numpy as np

from sdedit.cuda.device_loop import DeviceNetwork
from sdedit.cuda.driver import Driver
from sdedit.errors import NetworkError
from sdedit.loop import Array


class DeviceDenoiser:
    """(x (B, C, H, W), sigma (B,)) float32 -> D; copies x in and D out. Freed with its last reference."""

    def __init__(self, driver: Driver, network: DeviceNetwork, shape: tuple[int, int, int, int]) -> None:
        self._driver, self._network, self._shape = driver, network, shape
        frame = 4 * int(np.prod(shape))
        with driver.current():
            self._stream = driver.make_stream()
            self._x, self._denoised = driver.allocate(frame), driver.allocate(frame)
            self._sigma = driver.allocate(4 * shape[0])
            network.bind(self._x, self._sigma, self._denoised)
            self._pinned = [driver.allocate_pinned(frame), driver.allocate_pinned(4 * shape[0])]
        self._frame = self._pinned[0].view(np.float32).reshape(shape)
        self._level = self._pinned[1].view(np.float32)

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
        if not hasattr(self, "_level"):
            return
        with self._driver.current():
            self._driver.synchronize(self._stream)
            self._network.close()
            for pointer in (self._x, self._denoised, self._sigma):
                self._driver.free(pointer)
            for memory in self._pinned:
                self._driver.free_pinned(memory)
            self._driver.free_stream(self._stream)
