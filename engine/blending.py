"""Classical compositing, to compare with: OpenCV's Poisson blending, and Laplacian pyramids made with its filters."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import BackendUnavailable, OptionError
from sdedit.image import Pixels

LEAST = 8  # pixels a side for Poisson blending: six of them have the target's gradients
COARSEST = 8  # a pyramid ends before its shorter side is below this


def poisson(target: Pixels, source: Pixels, inside: NDArray[np.bool_]) -> Pixels:
    """The gradients of `source` with the edges of `target` (Pérez et al. 2003, eq. 9). (H, W, 3) uint8.

    OpenCV's solver takes the gradients of the outermost 3 pixels from `target`. inside: (H, W), a rectangle of at
    least 8x8. Raises OptionError, BackendUnavailable.
    """
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if min(len(rows), len(columns)) < LEAST:
        raise OptionError(
            f"a patch of {len(columns)}x{len(rows)} pixels is too small for Poisson blending",
            hint=f"it takes {LEAST}x{LEAST} or more: the gradients of its edge are the target's",
        )
    cv2 = _opencv()
    around = ((1, 1), (1, 1), (0, 0))  # seamlessClone drops a mask's pixels at the picture's border
    middle = int(columns[0]) + len(columns) // 2 + 1, int(rows[0]) + len(rows) // 2 + 1  # by which it places them
    blended: Pixels = cv2.seamlessClone(
        np.pad(source, around, "edge"), np.pad(target, around, "edge"), np.pad(inside, 1).astype(np.uint8) * 255,
        middle, cv2.NORMAL_CLONE,
    )[1:-1, 1:-1]  # fmt: skip
    return np.where(inside[..., None], blended, target)


def laplacian(target: Pixels, source: Pixels, inside: NDArray[np.bool_]) -> Pixels:
    """Each band of frequencies joined over its own width (Burt and Adelson 1983). (H, W, 3) uint8.

    The pyramids go down to a shorter side of 8. Raises BackendUnavailable.
    """
    cv2 = _opencv()
    weights = np.repeat(inside[..., None], 3, axis=2).astype(np.float32)
    upper, lower = source.astype(np.float32), target.astype(np.float32)
    bands = []
    while min(weights.shape[:2]) >= 2 * COARSEST:
        size = weights.shape[1], weights.shape[0]
        smaller = [cv2.pyrDown(one) for one in (upper, lower, weights)]
        fine = [one - cv2.pyrUp(small, dstsize=size) for one, small in zip((upper, lower), smaller, strict=False)]
        bands.append(_mix(fine[0], fine[1], weights))
        upper, lower, weights = smaller
    blended = _mix(upper, lower, weights)
    for band in reversed(bands):
        blended = band + cv2.pyrUp(blended, dstsize=(band.shape[1], band.shape[0]))
    return np.asarray(np.rint(np.clip(blended, 0, 255)), np.uint8)


def _mix(upper: NDArray[Any], lower: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(weights * upper + (1 - weights) * lower)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise BackendUnavailable(
            f"blending: OpenCV cannot be imported: {error}", hint="pip install 'sdedit-engine[compose]'"
        ) from error
    return cv2
