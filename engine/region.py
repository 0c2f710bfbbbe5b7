"""Masked edits cost what they touch: the network runs on windows around the mask, not on the whole frame.

The rule of `region="auto"`. The mask is cut into parts where it has gaps wider than both margins; each part gets a
window of the frame: the part's bounding box and a margin of 1/16 of the frame on every side, at least half of the
frame's width and height (a network knows pictures, not snippets), rounded up to the sizes that the network accepts
and shifted into the frame. If all windows together are at most 0.7 of the frame, they are edited, else the frame is.

A window draws the noise that its pixels have in the full frame, and what lies outside the mask is the guide anyway:
results differ from the full frame's only by what the network would have seen beyond the margin.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import OptionError
from sdedit.image import Box, Floats
from sdedit.loop import Array
from sdedit.noise import Noise

REGIONS = ("full", "auto")
MARGIN = 1 / 16  # of the frame, on each side of the mask
LEAST = 1 / 2  # of the frame's width and of its height
WORTH_IT = 0.7  # of the frame's pixels: beyond it, the whole frame costs about the same


@dataclass(frozen=True)
class Window:
    """What the network sees of a frame."""

    box: Box
    part: Box  # of the mask, inside it

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


def checked_region(region: object) -> str:
    """`region` if it is one of REGIONS. Raises OptionError."""
    if region not in REGIONS:
        raise OptionError(f"unknown region {region!r}", hint=f"choose one of {', '.join(REGIONS)}")
    return str(region)


def windows(omega: Floats, multiple: int) -> list[Window]:
    """One for each part of a mask; none where the whole frame is as good.

    omega: (H, W) in [0, 1], 1 = repaint. multiple: the network's sides are multiples of it.
    """
    height, width = omega.shape
    margins = [int(np.ceil(MARGIN * side)) for side in (width, height)]
    found = []
    for part in _parts(omega > 0, (0, 0), [2 * margin + 1 for margin in margins]):
        left, right = _span(part[0], part[2], margins[0], width, multiple)
        top, bottom = _span(part[1], part[3], margins[1], height, multiple)
        found.append(Window((left, top, right, bottom), part))
    pixels = sum(window.size[0] * window.size[1] for window in found)
    return found if pixels <= WORTH_IT * width * height else []


def _span(low: int, high: int, margin: int, side: int, multiple: int) -> tuple[int, int]:
    """From low - margin to high + margin, rounded up to a size the network takes, inside [0, side]."""
    wanted = max(high - low + 2 * margin, int(np.ceil(LEAST * side)))
    length = min(side, -(-wanted // multiple) * multiple)
    start = min(max(0, (low + high - length) // 2), side - length)
    return start, start + length


def _parts(inside: NDArray[np.bool_], corner: tuple[int, int], gaps: Sequence[int]) -> Iterator[Box]:
    """Bounding boxes (in the frame) of what is left when the mask is cut along empty bands at least `gaps` wide."""
    for axis in (0, 1):  # bands of columns, then of rows
        filled = np.flatnonzero(inside.any(axis=axis))
        if not len(filled):
            return
        cuts = np.flatnonzero(np.diff(filled) > gaps[axis])
        starts, ends = filled[np.r_[0, cuts + 1]], filled[np.r_[cuts, len(filled) - 1]] + 1
        if len(cuts):
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                piece = inside[:, start:end] if axis == 0 else inside[start:end]
                yield from _parts(piece, (corner[0] + start * (axis == 0), corner[1] + start * (axis == 1)), gaps)
            return
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    left, top = corner
    yield left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


class WindowNoise:
    """The noise of a full frame as seen through one window of it for each image."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], boxes: Sequence[Box], *, steps: int) -> None:
        self._full, self._boxes = Noise(seeds, shape, steps=steps), boxes
        self.draw_ahead = self._full.draw_ahead

    def __call__(self, step: int, repeat: int, stream: int) -> NDArray[np.float32]:
        normals = self._full(step, repeat, stream)
        return np.stack([crop(one, box) for one, box in zip(normals, self._boxes, strict=True)])


def crop(planes: Array, box: Box) -> Array:
    """The window of (…, H, W)."""
    left, top, right, bottom = box
    return planes[..., top:bottom, left:right]


def assemble(guide: Floats, edited: Sequence[tuple[Window, Array]]) -> Floats:
    """A frame (C, H, W) of the guide with what was edited in it: windows and their x.

    Where windows overlap, each part of the mask is taken from its own.
    """
    frame = guide.copy()
    for window, x in edited:
        crop(frame, window.box)[...] = x
    for window, x in edited:
        (left, top), part = window.box[:2], window.part
        crop(frame, part)[...] = crop(x, (part[0] - left, part[1] - top, part[2] - left, part[3] - top))
    return frame
