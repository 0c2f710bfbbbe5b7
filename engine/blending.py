"""Classical compositing, to compare with: OpenCV's Poisson blending, and Laplacian pyramids made with its filters."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import BackendUnavailable, OptionError
from sdedit.image import Pixels

COARSEST = 8  # a pyramid ends before its shorter side is below this


def poisson(target: Pixels, source: Pixels, inside: NDArray[np.bool_]) -> Pixels:
    """The gradients of `source` with the edges of `target` (Pérez et al. 2003, eq. 9). (H, W, 3) uint8.

    inside: (H, W), a rectangle of at least 3x3. Raises OptionError, BackendUnavailable.
    """
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if min(len(rows), len(columns)) < 3:
        raise OptionError(
            f"a patch of {len(columns)}x{len(rows)} pixels is too small for Poisson blending",
            hint="it takes 3x3 or more: its edge is the target's",
        )
    middle = int(columns[0]) + len(columns) // 2, int(rows[0]) + len(rows) // 2  # seamlessClone places by the middle
    cv2 = _opencv()
    blended: Pixels = cv2.seamlessClone(source, target, inside.astype(np.uint8) * 255, middle, cv2.NORMAL_CLONE)
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
