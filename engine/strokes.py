"""The paper's simulated stroke paintings (Meng et al. 2022, section 5 and appendix): a photograph becomes a guide.

A median filter of 23 pixels on a 256x256 photograph, then an adaptive palette of 6 colours. For another size the
filter is scaled with the shorter side, to the nearest odd number.
"""

from PIL import Image, ImageFilter

from sdedit import image
from sdedit.checks import whole
from sdedit.image import Source

COLORS, KERNEL = 6, 23
KERNEL_SIDE = 256  # the size KERNEL is meant for


def strokes(photo: Source, *, colors: int = COLORS, kernel: int = KERNEL) -> Image.Image:
    """A stroke painting of a photograph: RGB, its size. Deterministic.

    photo: a path, a PIL image or a uint8 array (H, W, 3). colors: 2 to 256. kernel: the median filter's width
    in pixels for a shorter side of 256. Raises ImageError, OptionError.
    """
    colors = whole("colors", colors, 2, 256, hint="the paper uses 6; fewer are coarser")
    kernel = whole("kernel", kernel, 1, 1023, hint="the paper uses 23; 1 does not filter")
    picture = Image.fromarray(image.read(photo, 3, role="photo").pixels)
    filtered = picture.filter(ImageFilter.MedianFilter(scaled_kernel(kernel, min(picture.size))))
    return filtered.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")


def scaled_kernel(kernel: int, side: int) -> int:
    """The odd number nearest to kernel · side/256, at least 1."""
    return 2 * round((kernel * side / KERNEL_SIDE - 1) / 2) + 1 if kernel * side > KERNEL_SIDE else 1
