"""What an edit gives back: pictures and where they came from, timings, and progress on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdedit import image
from sdedit.budget import Budget
from sdedit.image import Picture, Pixels, Placement
from sdedit.loop import Array, Step
from sdedit.options import EditOptions


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one `edit` call on this machine's clock."""

    total_ms: float  # everything, from reading the guides to the last result
    loop_ms: float  # noise, network and updates
    network_ms: float | None  # of which the network; None on a GPU, where all of it is one CUDA graph
    evaluations: int  # network calls
    device_ms: float | None = None  # on a GPU: all steps by CUDA events, between the copies to and from the host


@dataclass(frozen=True)
class Result:
    """One edited picture and where it came from."""

    guide: Picture
    mask: Picture | None
    placement: Placement
    seed: int
    x: Array  # (C, H, W) float32 at model size, unclipped, before pasting
    pixels: Pixels  # (H, W, C) uint8: model size, or the guide's with a mask


@dataclass(frozen=True)
class EditResult:
    """What `Editor.edit` returns; result number j = guide index * samples + sample index."""

    results: tuple[Result, ...]
    options: EditOptions
    timings: Timings
    executor_notes: tuple[str, ...] = ()
    budget: Budget | None = None  # why these steps, where `max_ms` was given

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, RGB (or L for a one-channel model), each with its guide's ICC profile."""
        return [image.to_image(result.pixels, result.guide.profile) for result in self.results]

    @property
    def x(self) -> NDArray[np.float32]:
        """The raw model output, (B, C, H, W) float32, unclipped, before pasting."""
        return np.stack([result.x for result in self.results])

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    @property
    def notes(self) -> list[str]:
        """What was converted while reading the guides and masks, and what ran otherwise than it could."""
        pictures = [picture for result in self.results for picture in (result.guide, result.mask) if picture]
        read = [note for picture in pictures for note in picture.notes]
        return list(dict.fromkeys((*read, *self.executor_notes)))


@dataclass(frozen=True)
class Progress:
    """What `on_step` is given after every step. Return False from it to cancel."""

    done: int  # network evaluations so far, of `total`
    total: int
    step: Step
    _pictures: Callable[[Array], list[Pixels]] = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """The network's current estimate of this batch's results, as `EditResult.images` would show them."""
        return [image.to_image(pixels) for pixels in self._pictures(self.step.denoised)]
