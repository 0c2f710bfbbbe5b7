"""A second implementation of the mathematics, slow and obvious, that shares nothing with the engine.

Plain float64 and Python integers: an SDE is its metadata dictionary, a step table a list of rows, an image one
(C, H, W) array. The tests compare the engine with this, and this with published numbers.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Sde = dict[str, Any]


# --- schedules -------------------------------------------------------------------------------------------------------


def sigma(sde: Sde, t: float) -> float:
    """σ(t), t in [0, 1]."""
    if t == 0:
        return 0.0
    if sde["kind"] == "ve":
        return sde["sigma_min"] * (sde["sigma_max"] / sde["sigma_min"]) ** t
    if sde["kind"] == "edm":
        low, high = (sde[end] ** (1 / sde["rho"]) for end in ("sigma_min", "sigma_max"))
        return (low + t * (high - low)) ** sde["rho"]
    return math.sqrt(1 / alpha_bar(sde, t) - 1)


def alpha_bar(sde: Sde, t: float) -> float:
    if sde["kind"] == "vp":
        return math.exp(-sde["beta_min"] * t - (sde["beta_max"] - sde["beta_min"]) * t**2 / 2)
    levels = [1.0, *sde["alphas_cumprod"]]  # level 0 is the clean image
    position = t * (len(levels) - 1)
    below = min(math.floor(position), len(levels) - 2)
    part = position - below
    return math.exp((1 - part) * math.log(levels[below]) + part * math.log(levels[below + 1]))


# --- samplers --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One step: x' = a x + b D + d (D − D_prev) + c z, from sigma to sigma_next."""

    sigma: float
    a: float
    b: float
    c: float
    d: float
    sigma_next: float


def grid(sde: Sde, t0: float, steps: int) -> list[float]:
    """σ(t0 n/N) for n = N..0."""
    return [sigma(sde, t0 * n / steps) for n in range(steps, -1, -1)]


def table(sde: Sde, t0: float, steps: int, sampler: str, eta: float | None = None) -> list[Row]:
    rows: list[Row] = []
    is_vp = sde["kind"] in ("vp", "vp-discrete")
    for s, s_next in pairwise(grid(sde, t0, steps)):
        last = rows[-1].sigma if rows else None
        a, c, d = (0.0, 0.0, 0.0) if s_next == 0 else coefficients(sampler, eta, is_vp, last, s, s_next)
        rows.append(Row(s, a, 1 - a, c, d, s_next))
    return rows


def coefficients(
    sampler: str, eta: float | None, is_vp: bool, last: float | None, s: float, s_next: float
) -> tuple[float, float, float]:
    """(a, c, d) of a step that is not the final one; `last` is the σ before s, None on the first step."""
    r = s_next / s
    if sampler == "em":
        variance = s**2 - s_next**2
        return r**2, math.sqrt(variance * (1 + s_next**2) / (1 + s**2) if is_vp else variance), 0.0
    if sampler == "ancestral":
        return r**2, s_next * math.sqrt(1 - r**2), 0.0
    if sampler == "ddim":
        up = (0.0 if eta is None else eta) * s_next * math.sqrt(1 - r**2)
        down = math.sqrt(s_next**2 - up**2)
        return down / s, up, 0.0
    if sampler == "dpmpp-2m-sde":
        eta = 1.0 if eta is None else eta
        a = r ** (1 + eta)
        d = 0.0 if last is None else 0.5 * (1 - a) * math.log(s / s_next) / math.log(last / s)
        return a, s_next * math.sqrt(1 - r ** (2 * eta)), d
    if sampler == "er-sde":
        a = phi(s_next) / phi(s)
        d = 0.0 if last is None else (s_next - s + phi(s_next) * integral_of_1_over_phi(s_next, s)) / (s - last)
        return a, math.sqrt(s_next**2 - a**2 * s**2), d
    raise ValueError(sampler)


def phi(s: float) -> float:
    return s * (math.exp(s**0.3) + 10)


def integral_of_1_over_phi(low: float, high: float, intervals: int = 400) -> float:
    """Simpson's rule in u = ln s, where ds/φ(s) = e^u du/φ(e^u)."""
    u = [math.log(low) + k * math.log(high / low) / intervals for k in range(intervals + 1)]
    f = [math.exp(v) / phi(math.exp(v)) for v in u]
    return (f[0] + 4 * sum(f[1:-1:2]) + 2 * sum(f[2:-1:2]) + f[-1]) * math.log(high / low) / intervals / 3


# --- noise -----------------------------------------------------------------------------------------------------------


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10, Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def normals(seed: int, shape: tuple[int, ...], step: int, repeat: int = 0, stream: int = 0) -> Array:
    """The normals of one image, `philox-bm24-v1`."""
    count = math.prod(shape)
    z: list[float] = []
    for block in range(-(-count // 4)):
        words = philox4x32((block, step, repeat, stream), (seed % 2**32, seed >> 32))
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (second >> 8) / 2**24
            z += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(z[:count]).reshape(shape)


# --- the recursion ---------------------------------------------------------------------------------------------------


def edit(
    denoiser: Callable[[Array, float], Array],
    guide: Array,
    rows: list[Row],
    seed: int,
    *,
    repeats: int = 1,
    mask: Array | None = None,
) -> Array:
    """The last D of one image, before any pasting. mask: Ω, 1 = repaint, None for all of it."""
    omega = np.ones_like(guide) if mask is None else np.broadcast_to(mask, guide.shape)
    start = guide
    denoised = guide
    for repeat in range(repeats):
        x = start + rows[0].sigma * normals(seed, guide.shape, 0, repeat)
        previous = None
        for step, row in enumerate(rows, start=1):
            denoised = denoiser(x, row.sigma)
            x = row.a * x + row.b * denoised + row.c * normals(seed, guide.shape, step, repeat)
            if previous is not None:
                x = x + row.d * (denoised - previous)
            if mask is not None and step < len(rows):
                fresh = normals(seed, guide.shape, step, repeat, 1)
                x = guide + omega * (x - guide) + row.sigma_next * np.sqrt(1 - omega**2) * fresh
            previous = denoised
        start = guide + omega * (denoised - guide)
    return denoised
