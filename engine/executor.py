"""What runs the edit of one batch: the loop on the host around any denoiser, or the loop on the GPU."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sdedit.capi.steps import compiled_steps
from sdedit.image import Box, Pixels
from sdedit.loop import Array, Denoiser, OnStep, Step, blend, denoise, perturb
from sdedit.noise import Noise
from sdedit.region import WindowNoise
from sdedit.schedule import StepTable

if TYPE_CHECKING:
    from sdedit.cuda.device_loop import DeviceLoop


@dataclass(frozen=True)
class Windows:
    """Which window of the full frame (C, H, W) each image of a batch is, for the noise that belongs to its pixels."""

    frame: tuple[int, ...]
    boxes: Sequence[Box]


@dataclass(frozen=True)
class Batch:
    """What is edited at once: B images of one frame. On a GPU, guide and mask may be addresses of such arrays there."""

    guide: Array | int  # (B, C, H, W) in [-1, 1]
    mask: Array | int | None  # (B, 1, H, W) in [0, 1], 1 = repaint; None for all of it
    seeds: Sequence[int]  # one an image
    table: StepTable
    repeats: int = 1
    windows: Windows | None = None  # on the host only; None where the images are whole frames


class Executor(Protocol):
    """Runs batches of one size. Used by one thread at a time."""

    evaluations: int  # network calls so far
    network_ms: float | None  # of which this long was spent in the network; None where that is not seen
    device_ms: float | None  # what the GPU took for all steps so far, by its own clock; None without one

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of how it ran."""
        ...

    def run(self, batch: Batch, on_step: OnStep | None) -> tuple[Array, Pixels | None]:
        """x (B, C, H, W) and, where they were made on the way, its pixels (B, H, W, C).

        Raises NetworkError, Cancelled.
        """
        ...

    def warm_up(self, batch: Batch) -> None:
        """Do once what the first `run` of such a batch would do and later ones would not."""
        ...


Lease = AbstractContextManager[Executor]  # an executor for the length of one edit


class HostExecutor:
    """The loop around a denoiser, its steps compiled where the shipped library loads, else in NumPy.

    draws_ahead: NumPy's noise in a thread beside the network's first evaluation.
    """

    device_ms: float | None = None

    def __init__(self, denoiser: Denoiser, *, draws_ahead: bool = False) -> None:
        self._denoiser, self._draws_ahead = denoiser, draws_ahead
        self.evaluations = 0
        self.network_ms: float | None = None
        self.notes: Sequence[str] = ()

    def run(self, batch: Batch, on_step: OnStep | None) -> tuple[Array, Pixels | None]:
        guide, mask = np.asarray(batch.guide), None if batch.mask is None else np.asarray(batch.mask)
        table, noise = batch.table, _noise(batch, guide.shape[1:])
        edited, inside = guide, None if mask is None else guide
        for repeat in range(batch.repeats):
            start = edited if repeat == 0 else blend(guide, edited, mask)
            x = perturb(start, table, noise, repeat=repeat)
            if self._draws_ahead and table.column("c").any():
                noise.draw_ahead(repeat)
            edited = denoise(
                self._evaluate, x, table, noise, repeat=repeat, guide=inside, mask=mask, on_step=on_step,
                advance=None if batch.windows else compiled_steps(x, table, batch.seeds, repeat, inside, mask),
            )  # fmt: skip
        return edited, None

    def warm_up(self, batch: Batch) -> None:
        """One evaluation: of the last row, where x = D."""
        last = StepTable(batch.table.rows[..., -1:, :])
        self.run(replace(batch, table=last, repeats=1), None)

    def _evaluate(self, x: Array, sigma: Array) -> Array:
        began = time.perf_counter()
        denoised = self._denoiser(x, sigma)
        self.network_ms = (self.network_ms or 0) + 1e3 * (time.perf_counter() - began)
        self.evaluations += 1
        return denoised


def _noise(batch: Batch, shape: tuple[int, ...]) -> Noise | WindowNoise:
    if batch.windows is None:
        return Noise(batch.seeds, shape, steps=batch.table.steps)
    return WindowNoise(batch.seeds, batch.windows.frame, batch.windows.boxes, steps=batch.table.steps)


class DeviceExecutor:
    """The loop on the GPU. Network and updates are one CUDA graph there: its parts are not timed.

    Wants the context current.
    """

    network_ms: float | None = None

    def __init__(self, loop: "DeviceLoop") -> None:
        self._loop = loop
        self.evaluations = 0
        self.device_ms: float | None = None

    @property
    def notes(self) -> Sequence[str]:
        return self._loop.notes

    def run(self, batch: Batch, on_step: OnStep | None) -> tuple[Array, Pixels | None]:
        def counted(step: Step) -> bool | None:
            self.evaluations += 1
            return None if on_step is None else on_step(step)

        before = self.evaluations
        x, pixels = self._loop.run(batch, None if on_step is None else counted)
        self.evaluations = before + batch.repeats * batch.table.steps
        self.device_ms = (self.device_ms or 0) + self._loop.device_ms()
        return x.copy(), pixels.copy()

    def warm_up(self, batch: Batch) -> None:
        """The whole edit: its CUDA graph is kept."""
        self.run(batch, None)
