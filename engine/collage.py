"""Collages, the paper's guides for compositing: rectangles of pictures copied onto a picture, and what to repaint.

With a blend, a classical baseline instead: the same rectangles, joined to the picture by Poisson or Laplacian-pyramid
blending (blending.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdedit import image
from sdedit.checks import whole
from sdedit.errors import ImageError, OptionError
from sdedit.image import Floats, Picture, Pixels, Source

BLENDS = ("poisson", "laplacian")
MOST_MARGIN = 10_000


@dataclass(frozen=True)
class Patch:
    """A rectangle of a picture, to be copied. In pixels, from the upper left corner."""

    source: Source
    x: int
    y: int
    width: int
    height: int
    to: tuple[int, int] | None = None  # x, y of its corner in the target; None is the same place


@dataclass(frozen=True)
class Collage:
    """What `compose` returns: pictures of the target's size."""

    guide: Image.Image  # RGB
    mask: Image.Image  # L, white = repaint
    notes: tuple[str, ...] = ()  # what was converted while reading


def compose(
    target: Source, patches: Sequence[Patch], *, grow: int = 0, feather: int = 0, blend: str | None = None
) -> Collage:
    """Copy patches onto a picture, one after the other, and say what to repaint.

    The mask is white where a patch lies and `grow` pixels around it, and fades to black over `feather` pixels more.
    blend: None pastes hard edges, which is the guide; "poisson" or "laplacian" is a classical composite to compare
    with. Raises ImageError (pictures, patches that do not fit), OptionError, BackendUnavailable (blends need OpenCV).
    """
    grow = whole("grow", grow, 0, MOST_MARGIN, hint="pixels around a patch; 0 repaints the patch alone")
    feather = whole("feather", feather, 0, MOST_MARGIN, hint="pixels over which the mask fades; 0 for a hard edge")
    if not patches:
        raise OptionError("no patch to copy", hint="give at least one")
    if blend is not None and blend not in BLENDS:
        raise OptionError(f"unknown blend {blend!r}", hint=f"choose one of {', '.join(BLENDS)}")
    onto = image.read(target, 3, role="target")
    pixels, mask, notes = onto.pixels, np.zeros(onto.pixels.shape[:2], np.float32), list(onto.notes)
    for patch in patches:
        source = image.read(patch.source, 3, role="source")
        notes += source.notes
        pixels = paste(pixels, source.pixels, _inside(patch, source, onto), blend)
        left, top = patch.to or (patch.x, patch.y)
        around = distance_outside(mask.shape, left, top, patch.width, patch.height)
        mask = np.maximum(mask, np.clip(1 - (around - grow) / np.float32(feather + 1), 0, 1))
    levels = np.rint(255 * mask).astype(np.uint8)
    return Collage(image.to_image(pixels, onto.profile), Image.fromarray(levels), tuple(dict.fromkeys(notes)))


def paste(target: Pixels, source: Pixels, patch: Patch, blend: str | None) -> Pixels:
    """The target with one patch on it, (H, W, 3) uint8."""
    left, top = patch.to or (patch.x, patch.y)
    height, width = target.shape[:2]
    # the source, moved so that the patch lies where it goes; its edges repeated where it does not reach
    rows = np.clip(np.arange(height) - top + patch.y, 0, source.shape[0] - 1)
    columns = np.clip(np.arange(width) - left + patch.x, 0, source.shape[1] - 1)
    moved = source[rows[:, None], columns]
    inside = np.zeros((height, width), bool)
    inside[top : top + patch.height, left : left + patch.width] = True
    if blend is None:
        return np.where(inside[..., None], moved, target)
    from sdedit import blending

    return (blending.poisson if blend == "poisson" else blending.laplacian)(target, moved, inside)


def distance_outside(shape: tuple[int, ...], left: int, top: int, width: int, height: int) -> Floats:
    """How many rows or columns, whichever is more, each pixel lies outside a rectangle; 0 inside. (H, W) float32."""
    y, x = np.arange(shape[0])[:, None], np.arange(shape[1])
    vertical = np.maximum(top - y, y - (top + height - 1))
    horizontal = np.maximum(left - x, x - (left + width - 1))
    return np.maximum(np.maximum(vertical, horizontal), 0).astype(np.float32)


def _inside(patch: Patch, source: Picture, target: Picture) -> Patch:
    """The patch, if it lies inside both pictures. Raises OptionError, ImageError."""
    to = (patch.x, patch.y) if patch.to is None else patch.to
    numbers = [patch.x, patch.y, patch.width, patch.height, *(to if isinstance(to, tuple | list) else [to])]
    if len(numbers) != 6 or not all(isinstance(one, int | np.integer) for one in numbers):
        raise OptionError(
            f"a patch at {numbers}; wanted whole pixels", hint="Patch(source, x, y, width, height, (x, y))"
        )
    size = f"{patch.width}x{patch.height}"
    if patch.width < 1 or patch.height < 1:
        raise OptionError(f"a patch of {size} pixels", hint="width and height are at least 1")
    for picture, (x, y), role in ((source, (patch.x, patch.y), "from"), (target, to, "to")):
        width, height = picture.size
        if x < 0 or y < 0 or x + patch.width > width or y + patch.height > height:
            raise ImageError(
                f"{picture.label}: is {width}x{height}; a patch of {size} {role} {x},{y} is not inside it",
                hint="a patch is X,Y,WIDTH,HEIGHT of its source, and :X,Y in the target where that is another place",
            )
    return patch
