"""Device loops between edits: what was allocated and captured for a shape serves the next edit of that shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from sdedit.cuda.device_loop import DeviceLoop
from sdedit.errors import Cancelled, DeviceError, NetworkError

Shape = tuple[int, int, int, int]
LEAST_KEPT = 2  # idle loops, unless told otherwise; or as many as were busy at one time


class LoopPool:
    """Lends loops, each to one edit at a time. Thread-safe; every method wants the context current."""

    def __init__(self, least_kept: int = LEAST_KEPT) -> None:
        self._least_kept = least_kept
        self._lock = Lock()
        self._idle: list[DeviceLoop] = []  # the longest unused first
        self._busy = self._most_busy = 0

    @contextmanager
    def lease(self, shape: Shape, make: Callable[[Shape], DeviceLoop]) -> Iterator[DeviceLoop]:
        """A loop for batches of this shape, idle or made, for the length of a `with` block."""
        with self._lock:
            self._busy += 1
            self._most_busy = max(self._most_busy, self._busy)
        loop = None
        try:
            loop = self._take(shape) or self._made(shape, make)
            yield loop
        except (Cancelled, NetworkError):  # the loop is as good as before
            self._put(loop)
            raise
        except BaseException:
            if loop is not None:
                with suppress(DeviceError):
                    loop.close()
            raise
        else:
            self._put(loop)
        finally:
            with self._lock:
                self._busy -= 1

    def close(self) -> None:
        """Free every idle loop."""
        with self._lock:
            idle, self._idle = self._idle, []
        for loop in idle:
            with suppress(DeviceError):
                loop.close()

    def _take(self, shape: Shape) -> DeviceLoop | None:
        with self._lock:
            found = next((loop for loop in reversed(self._idle) if loop.shape == shape), None)
            if found is not None:
                self._idle.remove(found)
            return found

    def _made(self, shape: Shape, make: Callable[[Shape], DeviceLoop]) -> DeviceLoop:
        try:
            return make(shape)
        except DeviceError:
            if not self._idle:
                raise
        self.close()  # what is idle may be what fills the memory
        return make(shape)

    def _put(self, loop: DeviceLoop | None) -> None:
        if loop is None:
            return
        with self._lock:
            self._idle.append(loop)
            most = max(self._least_kept, self._most_busy)
            surplus, self._idle = self._idle[:-most], self._idle[-most:]
        for one in surplus:
            with suppress(DeviceError):
                one.close()
