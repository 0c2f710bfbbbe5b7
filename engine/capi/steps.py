"""The steps of a pass by the shipped library: update, noise and mask in one sweep over x, with NumPy's bits."""

import ctypes
from collections.abc import Sequence

import numpy as np

from sdedit.capi import shipped
from sdedit.loop import Array
from sdedit.schedule import StepTable

OK, NOT_FINITE = 0, 3  # enum sdedit_result
_SIZES = ("version", "images", "channels", "plane", "steps", "tables")
_POINTERS = ("x", "sigma", "denoised", "previous", "guide", "mask", "table", "seeds")


class Batch(ctypes.Structure):
    """struct sdedit_batch"""

    _fields_ = [(name, ctypes.c_uint32) for name in _SIZES] + [(name, ctypes.c_void_p) for name in _POINTERS]


class CompiledSteps:
    """`sdedit_step` as `loop.denoise` takes it. x: contiguous float32 (B, C, H, W), which guide and mask,
    (B, 1, H, W), broadcast to. Raises OptionError: the table is for another number of images.
    """

    def __init__(
        self, library: ctypes.CDLL, x: Array, table: StepTable, seeds: Sequence[int], repeat: int,
        guide: Array | None, mask: Array | None,
    ) -> None:  # fmt: skip
        images, channels, height, width = x.shape
        rows = np.ascontiguousarray(table.rows_for(images), np.float32)
        self._step, self._repeat = library.sdedit_step, repeat
        self._batch = Batch(shipped.INTERFACE, images, channels, height * width, table.steps, len(rows))
        self._reference = ctypes.byref(self._batch)
        self._arrays: dict[str, Array | np.ndarray] = {}  # alive while the library has their addresses
        self._point("x", x)
        self._point("sigma", np.empty(images, np.float32))
        self._point("table", rows)
        self._point("seeds", np.array(seeds, np.uint64))
        if table.column("d").any():
            self._point("previous", np.empty_like(x))
        if guide is not None and mask is not None:
            self._point("guide", np.ascontiguousarray(np.broadcast_to(guide, x.shape), np.float32))
            of_images = np.broadcast_to(mask, (images, 1, height, width))  # ValueError for one of every channel
            self._point("mask", np.ascontiguousarray(of_images, np.float32))

    def __call__(self, number: int, denoised: Array) -> bool:
        """See loop.Advance."""
        if denoised is not self._arrays.get("denoised"):  # or was copied, and so is another array
            self._point("denoised", np.ascontiguousarray(denoised, np.float32))
        result = self._step(self._reference, number, self._repeat)
        assert result in (OK, NOT_FINITE), f"sdedit_step returned {result}"
        return bool(result == OK)

    def _point(self, name: str, array: Array | np.ndarray) -> None:
        self._arrays[name] = array
        setattr(self._batch, name, array.ctypes.data)


def compiled_steps(
    x: Array, table: StepTable, seeds: Sequence[int], repeat: int, guide: Array | None, mask: Array | None
) -> CompiledSteps | None:
    """Those of a pass over x; None where NumPy is to make them."""
    library = shipped.open_library()
    if library is None or x.dtype != np.float32 or not x.flags.c_contiguous:
        return None
    return CompiledSteps(library, x, table, seeds, repeat, guide, mask)
