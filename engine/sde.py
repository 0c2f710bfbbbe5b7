"""Noise schedules: the standard deviation σ(t) of the noise at time t in [0, 1], and its inverse.

Everything runs in the variance-exploding frame, x = x0 + σ z with data in [-1, 1]. A variance-preserving
state is √ᾱ x with σ = √((1-ᾱ)/ᾱ), so a VP schedule is one more σ(t). Every schedule has σ(0) = 0.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdedit.errors import ArtifactError

Floats = NDArray[np.float64]


class Sde(Protocol):
    """A forward process: x(t) = x0 + σ(t) z."""

    kind: ClassVar[str]
    variance_preserving: ClassVar[bool]

    @property
    def sigma_min(self) -> float:
        """The smallest level above 0 that its networks are trained and sampled at."""
        ...

    def sigma(self, t: ArrayLike) -> Floats:
        """σ(t), float64, the shape of t. t in [0, 1]; σ(0) = 0."""
        ...

    def time(self, sigma: ArrayLike) -> Floats:
        """The inverse: t with σ(t) = sigma, clipped to [0, 1]."""
        ...


@dataclass(frozen=True)
class VE:
    """Variance exploding, σ_min (σ_max/σ_min)^t: Song et al. 2021, appendix C; for data in [-1, 1].

    A network trained on [0, 1] data has both ends doubled here.
    """

    sigma_min: float
    sigma_max: float
    kind: ClassVar[str] = "ve"
    variance_preserving: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_increasing(self.sigma_min, self.sigma_max)

    def sigma(self, t: ArrayLike) -> Floats:
        t = np.asarray(t, np.float64)
        with np.errstate(all="ignore"):
            return _zero_at_start(t, self.sigma_min * (np.float64(self.sigma_max) / self.sigma_min) ** t)

    def time(self, sigma: ArrayLike) -> Floats:
        above = np.maximum(np.asarray(sigma, np.float64), self.sigma_min)
        with np.errstate(all="ignore"):
            time: Floats = np.log(above / self.sigma_min) / (np.log(self.sigma_max) - np.log(self.sigma_min))
        return time.clip(0, 1)


@dataclass(frozen=True)
class VP:
    """Variance preserving, linear β(t): ᾱ(t) = exp(-β_min t - (β_max - β_min) t²/2). Song et al. 2021, eq. 33."""

    beta_min: float
    beta_max: float
    kind: ClassVar[str] = "vp"
    variance_preserving: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max < np.inf or self.beta_max == 0:
            raise ArtifactError(
                f"sde: beta_min {self.beta_min}, beta_max {self.beta_max}; wanted 0 <= beta_min <= beta_max > 0",
                hint="the usual values are 0.1 and 20",
            )

    def sigma(self, t: ArrayLike) -> Floats:
        t = np.asarray(t, np.float64)
        with np.errstate(over="ignore"):
            return np.sqrt(np.expm1(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2))

    @property
    def sigma_min(self) -> float:
        """σ(10⁻³): where Song et al. 2021 end their VP samplers. The schedule itself goes down to 0."""
        return float(self.sigma(1e-3))

    def time(self, sigma: ArrayLike) -> Floats:
        decay = np.asarray(np.log1p(np.asarray(sigma, np.float64) ** 2))  # -log ᾱ
        root = np.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * decay)
        return np.clip(2 * decay / np.maximum(self.beta_min + root, np.finfo(np.float64).tiny), 0, 1)


@dataclass(frozen=True)
class VPDiscrete:
    """The trained levels ᾱ_0 … ᾱ_{T-1}: t = (i+1)/T is level i, between levels log ᾱ is linear in t.

    Ho et al. 2020. ᾱ(0) = 1. A tail of ᾱ = 0 (zero terminal signal-to-noise) has σ = ∞.
    """

    alphas_cumprod: tuple[float, ...]
    kind: ClassVar[str] = "vp-discrete"
    variance_preserving: ClassVar[bool] = True

    def __post_init__(self) -> None:
        levels = np.array((1.0, *self.alphas_cumprod), np.float64)
        falls = (np.diff(levels) < 0) | (levels[1:] == 0)
        if len(levels) < 2 or not np.all((levels >= 0) & (levels <= 1)) or not np.all(falls) or levels[1] == 0:
            raise ArtifactError(
                "sde: alphas_cumprod must fall strictly from below 1 towards 0",
                hint="store the scheduler's cumulative products, level 0 first",
            )

    @cached_property
    def _levels(self) -> tuple[Floats, Floats]:
        """Times 0, 1/T, …, 1 as far as there is a signal, and -log ᾱ there."""
        with np.errstate(divide="ignore"):
            decay = 0.0 - np.log(np.array((1.0, *self.alphas_cumprod), np.float64))  # not -0 at ᾱ = 1
        finite = np.isfinite(decay)
        return (np.arange(len(decay)) / (len(decay) - 1))[finite], decay[finite]

    def sigma(self, t: ArrayLike) -> Floats:
        times, decay = self._levels
        t = np.asarray(t, np.float64)
        with np.errstate(over="ignore"):
            sigma = np.sqrt(np.expm1(np.interp(t, times, decay)))
        return np.where(t > times[-1], np.inf, sigma)

    @property
    def sigma_min(self) -> float:
        """That of level 0, ᾱ_0."""
        return float(self.sigma(1 / len(self.alphas_cumprod)))

    def time(self, sigma: ArrayLike) -> Floats:
        times, decay = self._levels
        return np.interp(np.log1p(np.asarray(sigma, np.float64) ** 2), decay, times)


@dataclass(frozen=True)
class EDM:
    """(σ_min^(1/ρ) + t (σ_max^(1/ρ) - σ_min^(1/ρ)))^ρ: Karras et al. 2022, eq. 5, with t = 1 the noisiest."""

    sigma_min: float
    sigma_max: float
    rho: float
    kind: ClassVar[str] = "edm"
    variance_preserving: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_increasing(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < np.inf:
            raise ArtifactError(f"sde: rho is {self.rho}; wanted a positive number", hint="the usual value is 7")

    def sigma(self, t: ArrayLike) -> Floats:
        t = np.asarray(t, np.float64)
        low, high = self._ends()
        with np.errstate(all="ignore"):
            return _zero_at_start(t, (low + t * (high - low)) ** self.rho)

    def time(self, sigma: ArrayLike) -> Floats:
        low, high = self._ends()
        with np.errstate(all="ignore"):
            time: Floats = (np.asarray(sigma, np.float64) ** (1 / self.rho) - low) / (high - low)
        return time.clip(0, 1)

    def _ends(self) -> Floats:
        """σ_min^(1/ρ) and σ_max^(1/ρ)."""
        with np.errstate(all="ignore"):
            return np.array((self.sigma_min, self.sigma_max), np.float64) ** (1 / np.float64(self.rho))


def _zero_at_start(t: Floats, sigma: Floats) -> Floats:
    return np.asarray(np.where(t > 0, sigma, 0.0), np.float64)


def _require_increasing(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ArtifactError(
            f"sde: sigma_min {sigma_min}, sigma_max {sigma_max}; wanted 0 < sigma_min < sigma_max",
            hint="sigmas are standard deviations for data in [-1, 1]",
        )


FIELDS: dict[str, tuple[Callable[..., Sde], tuple[str, ...]]] = {
    "ve": (VE, ("sigma_min", "sigma_max")),
    "vp": (VP, ("beta_min", "beta_max")),
    "vp-discrete": (VPDiscrete, ("alphas_cumprod",)),
    "edm": (EDM, ("sigma_min", "sigma_max", "rho")),
}


def from_metadata(fields: Mapping[str, Any]) -> Sde:
    """The schedule that an artifact's `sde` object describes. Raises ArtifactError."""
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ArtifactError(
            f"sde.kind is {kind!r}; wanted one of {', '.join(FIELDS)}",
            hint="correct the sde object in the model's metadata",
        )
    cls, names = FIELDS[kind]
    values: list[float | tuple[float, ...]] = []
    for name in names:
        value = fields.get(name)
        many = name == "alphas_cumprod"
        if not (isinstance(value, list) and all(map(_is_number, value)) if many else _is_number(value)):
            wanted = "a list of numbers" if many else "a number"
            raise ArtifactError(
                f"sde.{name} is {_short(value)}; wanted {wanted}", hint="correct the sde object in the model's metadata"
            )
        values.append(tuple(map(float, value)) if isinstance(value, list) else float(fields[name]))
    return cls(*values)


def _is_number(value: object) -> bool:
    """A JSON number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
