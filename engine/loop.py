"""SDEdit on one page: noise the guide up to t0, then integrate the reverse SDE back (Meng et al. 2022)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import Cancelled, NetworkError, OptionError
from sdedit.noise import STREAM_MASK, STREAM_STATE, NoiseSource
from sdedit.schedule import COLUMNS, StepTable

Array = NDArray[np.floating[Any]]


class Denoiser(Protocol):
    """A score network, seen as the estimator D(x; σ) of the clean image."""

    def __call__(self, x: Array, sigma: Array) -> Array:
        """x (B, C, H, W), sigma (B,) -> (B, C, H, W). May return the same buffer every time."""
        ...


@dataclass(frozen=True)
class Step:
    """One finished step, as `on_step` sees it. The arrays are the loop's own: copy what you keep."""

    number: int  # 1 … steps
    steps: int
    repeat: int  # 0 … repeats - 1
    sigma: NDArray[np.float64]  # σ at the start of the step: () or (B,)
    _denoised: Callable[[], Array] = field(repr=False)

    @property
    def denoised(self) -> Array:
        """(B, C, H, W), the network's current estimate of the result; copied from a GPU only when asked for."""
        return self._denoised()


OnStep = Callable[[Step], bool | None]


class Advance(Protocol):
    """Makes the steps of one pass, once the network has answered."""

    def __call__(self, number: int, denoised: Array) -> bool:
        """Take x to the level below, in place. False, with x as it was, where D of step `number` has NaN or Inf."""
        ...


def perturb(guide: Array, table: StepTable, noise: NoiseSource, *, repeat: int = 0) -> Array:
    """x(t0) = guide + σ(t0) z. guide (B, C, H, W) in [-1, 1] -> a new array of its shape and precision."""
    sigma, *_ = _columns(table, 0, guide)
    return np.asarray(guide + sigma * noise(0, repeat, STREAM_STATE), guide.dtype)


@np.errstate(over="ignore", invalid="ignore")  # a network's overflow is found and named below
def denoise(
    denoiser: Denoiser,
    x: Array,
    table: StepTable,
    noise: NoiseSource,
    *,
    repeat: int = 0,
    guide: Array | None = None,
    mask: Array | None = None,
    on_step: OnStep | None = None,
    advance: Advance | None = None,
) -> Array:
    """Algorithm 1: from x at level σ(t0) to the clean image, in the precision of x. Works in place on x.

    x, guide: (B, C, H, W). mask: broadcasts to it, in [0, 1], 1 = repaint; needs the guide. advance: makes the steps
    of this pass over x, with this noise and mask, in NumPy's stead.
    Returns x, which holds the last D. Raises NetworkError (NaN, Inf or a wrong shape, with the step), Cancelled,
    and OptionError where table, guide and mask do not belong together.
    """
    if (mask is None) != (guide is None):
        raise OptionError("mask and guide go together in denoise()", hint="pass both or neither")
    if advance is None:
        advance = _numpy_steps(x, table, noise, repeat, guide, mask)
    levels = np.empty((table.steps, len(x)), x.dtype)
    levels[...] = table.column("sigma").T.reshape(table.steps, -1)
    for number, sigma in enumerate(levels, start=1):
        denoised = denoiser(x, sigma)
        if denoised.shape != x.shape:
            raise NetworkError(
                f"the network returned shape {denoised.shape}; wanted {x.shape}", hint="check the model's output"
            )
        if not advance(number, denoised):
            bad = int(np.count_nonzero(~np.isfinite(denoised)))
            raise not_finite(f"{bad} NaN or Inf values", number, table, repeat)
        if on_step is not None:
            level = table.column("sigma")[..., number - 1]
            if on_step(Step(number, table.steps, repeat, level, partial(np.asarray, denoised))) is False:
                raise Cancelled(f"cancelled at step {number} of {table.steps}", hint="on_step returned False")
    return x


def _numpy_steps(
    x: Array, table: StepTable, noise: NoiseSource, repeat: int, guide: Array | None, mask: Array | None
) -> Advance:
    """x' = a x + b D + d (D - D_previous) + c z, and what a mask keeps is put at the level just reached."""
    coefficients = [_columns(table, n, x) for n in range(table.steps)]
    work, previous = np.empty_like(x), np.empty_like(x)
    noisy, corrected = (np.count_nonzero(np.atleast_2d(table.column(name)), axis=0) for name in ("c", "d"))
    two_step = bool(corrected.any())
    if mask is not None and guide is not None:
        mask = np.asarray(mask, x.dtype)
        kept = (1 - mask) * guide
        mask_noise = np.sqrt(1 - mask**2)

    def advance(number: int, denoised: Array) -> bool:
        if not np.isfinite(denoised.sum()) and not np.isfinite(denoised).all():
            return False
        _, a, b, c, d, sigma_next = coefficients[number - 1]
        np.multiply(denoised, b, out=work)
        if two_step:
            if corrected[number - 1]:
                np.subtract(denoised, previous, out=previous)
                np.multiply(previous, d, out=previous)
                np.add(work, previous, out=work)
            np.copyto(previous, denoised)
        np.multiply(x, a, out=x)
        np.add(x, work, out=x)
        if noisy[number - 1]:
            np.multiply(noise(number, repeat, STREAM_STATE), c, out=work)
            np.add(x, work, out=x)
        if mask is not None and number < table.steps:
            np.multiply(x, mask, out=x)
            np.add(x, kept, out=x)
            np.multiply(noise(number, repeat, STREAM_MASK), mask_noise, out=work)
            np.multiply(work, sigma_next, out=work)
            np.add(x, work, out=x)
        return True

    return advance


def blend(guide: Array, edited: Array, mask: Array | None) -> Array:
    """guide + Ω (edited - guide), exact at both ends: Ω = 0 gives the guide, Ω = 1 the edit."""
    return edited if mask is None else (1 - mask) * guide + mask * edited


def _columns(table: StepTable, n: int, x: Array) -> tuple[Array, ...]:
    """The COLUMNS of row n, each (1 or B, 1, 1, 1), in the precision of x. Raises OptionError."""
    rows = table.rows_for(len(x))[:, n].astype(x.dtype)
    return tuple(rows.T.reshape(len(COLUMNS), -1, *(1,) * (x.ndim - 1)))


def not_finite(what: str, number: int, table: StepTable, repeat: int) -> NetworkError:
    """The error for a D of step `number` that holds NaN or Inf: `what` says so, with their count where it is known."""
    sigma = np.max(table.column("sigma")[..., number - 1])
    return NetworkError(
        f"the network returned {what} at step {number} of {table.steps} (repeat {repeat}, σ = {sigma:.4g})",
        hint="the model may overflow in its precision, or not know this σ: use an fp32 model or a smaller t0",
    )
