"""The compiled kernels and the structure they take: sdedit.cuh, interface version 1, seen from Python."""

from pathlib import Path

import numpy as np

from sdedit.cuda.driver import Driver, Handle
from sdedit.errors import BackendUnavailable, DeviceError

INTERFACE = 1
FATBIN = Path(__file__).with_name("sdedit.fatbin")
THREADS = 256
WRONG_INTERFACE = 0xFFFFFFFF  # as a fault

POINTERS = ("x", "sigma", "denoised", "previous", "guide", "mask", "table", "seeds", "state", "pixels")
EDIT = np.dtype(
    [(name, np.uint32) for name in ("interface", "batch", "elements", "plane", "steps", "tables")]
    + [(name, np.uint64) for name in POINTERS]
)  # struct sdedit_edit
STATE = np.dtype([("step", np.uint32), ("repeat", np.uint32), ("blocks", np.uint32), ("fault", np.uint32)])


class Kernels:
    """The module on the GPU, and its three functions. Wants the context current."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._module: Handle = driver.load(FATBIN.read_bytes())
        try:
            self.start: Handle = driver.function(self._module, "sdedit_start")
            self.step: Handle = driver.function(self._module, "sdedit_step")
            self.pixels: Handle = driver.function(self._module, "sdedit_pixels")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unload the module. The functions hold it too."""
        for name in ("start", "step", "pixels"):
            vars(self).pop(name, None)
        self._driver.unload(vars(self).pop("_module"))


def require_kernels(driver: Driver, name: str) -> None:
    """Raise BackendUnavailable if this GPU and driver do not take the kernels, before anything is built for them."""
    try:
        with driver.current():
            Kernels(driver).close()
    except DeviceError as error:
        raise BackendUnavailable(
            f"{name}: {driver.gpu.name} ({driver.gpu.target}, driver {driver.gpu.driver}) does not take our kernels: "
            f"{error}",
            hint="they want compute capability 7.5 or later and driver 580 (CUDA 13) or later",
        ) from error


def grid(elements: int, batch: int) -> tuple[int, int]:
    """Thread blocks of sdedit_start and sdedit_step: a thread for four elements."""
    return -(-elements // (4 * THREADS)), batch


def pixel_grid(plane: int, batch: int) -> tuple[int, int]:
    """Thread blocks of sdedit_pixels: a thread for a pixel."""
    return -(-plane // THREADS), batch
