"""The paper's simulated stroke paintings (Meng et al. 2022, section 5 and appendix): a photograph becomes a guide.

A median filter of 23 pixels on a 256x256 photograph, then an adaptive palette of 6 colours. For another size the
filter is scaled with the shorter side, to the nearest odd number.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sdedit import image
from sdedit.checks import whole
from sdedit.image import Pixels, Source

COLORS, KERNEL = 6, 23
KERNEL_SIDE = 256  # the size KERNEL is meant for
PILLOW_IS_FASTER = 9  # up to this width; its time grows with the square of it


def strokes(photo: Source, *, colors: int = COLORS, kernel: int = KERNEL) -> Image.Image:
    """A stroke painting of a photograph: RGB, its size. Deterministic.

    photo: a path, a PIL image or a uint8 array (H, W, 3). colors: 2 to 256. kernel: the median filter's width
    in pixels for a shorter side of 256; 1 does not filter. Raises ImageError, OptionError.
    """
    colors = whole("colors", colors, 2, 256, hint="the paper uses 6; fewer are coarser")
    kernel = whole("kernel", kernel, 1, 255, hint="the paper uses 23, on 256x256; 1 does not filter")
    pixels = image.read(photo, 3, role="photo").pixels
    width = scaled_kernel(kernel, min(pixels.shape[:2]))
    if width <= PILLOW_IS_FASTER:
        filtered = Image.fromarray(pixels).filter(ImageFilter.MedianFilter(width))
    else:
        filtered = Image.merge("RGB", [Image.fromarray(median(pixels[..., c], width)) for c in range(3)])
    return filtered.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")


def scaled_kernel(kernel: int, side: int) -> int:
    """The odd number nearest to kernel · side/256, the larger of two."""
    return 2 * (kernel * side // (2 * KERNEL_SIDE)) + 1 if kernel > 1 else 1


def median(plane: Pixels, kernel: int) -> Pixels:
    """Pillow's median filter of an odd width, edges repeated, in a time that does not grow with it. (H, W) uint8.

    The median is above a level if at most half of the window is not: one box count a level.
    """
    levels = np.unique(plane)
    padded = np.pad(plane, kernel // 2, mode="edge")
    rank = np.zeros(plane.shape, np.uint8)
    for level in levels[:-1]:
        counts = box_sums(box_sums(padded <= level, kernel).T, kernel).T
        rank += counts <= kernel * kernel // 2
    return levels[rank]


def box_sums(values: NDArray[Any], width: int) -> NDArray[np.int32]:
    """The sums of every `width` neighbours in a column."""
    sums = np.cumsum(values, axis=0, dtype=np.int32)
    sums[width:] -= sums[:-width].copy()
    return sums[width - 1 :]
