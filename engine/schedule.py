"""Schedule and sampler become data: the step table.

A sampler is N rows of coefficients; every executor runs the same update with them,

    x' = a·x + (b·D + d·(D - D_prev)) + c·z,      D = D(x; σ),   z ~ N(0, I),

in floating point in this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdedit.checks import real, whole
from sdedit.errors import OptionError
from sdedit.sde import Floats, Sde

COLUMNS = ("sigma", "a", "b", "c", "d", "sigma_next")
MOST_ETA = 100.0
TABLE_VERSION = 1
LARGEST_SIGMA = 1e30  # beyond it float32 arithmetic on x has nothing left to say
MOST_STEPS = 100_000  # more is a slip of the keyboard: the paper's largest N is 1,000
DEFAULT_ETA = {"ddim": 0.0, "dpmpp-2m-sde": 1.0}  # the samplers that take η
SPACINGS = ("uniform", "log-sigma", "karras")
KARRAS_RHO = 7  # of the spacing "karras"
SAMPLERS = ("em", "ancestral", "ddim", "dpmpp-2m-sde", "er-sde")


@dataclass(frozen=True)
class StepTable:
    """The coefficients of N denoising steps, columns as in COLUMNS.

    rows: (N, 6) float64, one table for every image; or (B, N, 6), one for each image of a batch.
    Executors use them in the precision of x (float32 in production).
    """

    rows: Floats
    version: int = TABLE_VERSION

    def __post_init__(self) -> None:
        if self.rows.ndim not in (2, 3) or self.rows.shape[-1] != len(COLUMNS) or self.rows.shape[-2] == 0:
            raise OptionError(
                f"step table has shape {self.rows.shape}; wanted (N, {len(COLUMNS)}) or (B, N, {len(COLUMNS)})",
                hint="make tables with sdedit.plan",
            )

    @property
    def steps(self) -> int:
        return int(self.rows.shape[-2])

    def column(self, name: str) -> Floats:
        """One column: (N,) or (B, N)."""
        return self.rows[..., COLUMNS.index(name)]

    def rows_for(self, images: int) -> Floats:
        """The tables of a batch of `images`: (1, N, 6), one for all, or (images, N, 6). Raises OptionError."""
        tables = self.rows.reshape(-1, *self.rows.shape[-2:])
        if len(tables) not in (1, images):
            raise OptionError(
                f"step table for {len(tables)} images, batch of {images}",
                hint="stack one table per image, or pass one for all",
            )
        return tables

    @staticmethod
    def stack(tables: Sequence["StepTable"]) -> "StepTable":
        """One table per image. All must have the same number of steps."""
        if len({table.rows.shape for table in tables}) != 1 or tables[0].rows.ndim != 2:
            raise OptionError(
                f"cannot stack step tables of shapes {[table.rows.shape for table in tables]}",
                hint="images that share a batch need the same number of steps",
            )
        return StepTable(np.stack([table.rows for table in tables]))


def plan(
    sde: Sde,
    *,
    t0: float = 0.5,
    steps: int = 50,
    sampler: str = "ancestral",
    eta: float | None = None,
    spacing: str = "uniform",
) -> StepTable:
    """The step table from t0 down to 0 in `steps` steps.

    t0 in (0, 1]: where the guide enters. eta: the share of fresh noise, for `ddim` (default 0, at most 1)
    and `dpmpp-2m-sde` (default 1). spacing: the levels are those of times `uniform` in [0, t0] (the paper's), or
    go from σ(t0) to the schedule's σ_min and then to 0: by equal factors (`log-sigma`), or with equal steps of
    σ^(1/7) (`karras`). Raises OptionError.
    """
    t0, steps, spacing = checked_t0(t0), checked_steps(steps), checked_spacing(spacing)
    eta = resolve_eta(sampler, eta)
    sigmas = sde.sigma(t0 * (np.arange(steps, -1, -1) / steps))  # starts at t0 itself, not one rounding beside it
    if not sigmas[0] <= LARGEST_SIGMA:
        largest = latest_t0(sde)
        raise OptionError(
            f"t0 is {t0}, where this model's schedule has no signal left (σ is infinite)",
            hint=f"use t0 <= {largest:g}" if largest > 0 else "the schedule in the model's metadata makes no sense",
        )
    too_close = OptionError(
        f"{steps} steps from t0 {t0} are too close together for this schedule", hint="use fewer steps or a larger t0"
    )
    if spacing != "uniform" and steps > 1:
        sigmas = _respaced(spacing, sigmas[0], sde.sigma_min, steps)
    if not np.all(np.diff(sigmas) < 0):
        raise too_close
    with np.errstate(all="ignore"):
        rows = np.array(_rows(sampler, sde.variance_preserving, eta or 0.0, sigmas))
    if not np.isfinite(rows).all():
        raise too_close
    return StepTable(rows)


def latest_t0(sde: Sde) -> float:
    """The largest t0 that `plan` takes: below 1 where the schedule ends without any signal."""
    return 1.0 if sde.sigma(1.0) <= LARGEST_SIGMA else float(np.floor(1e6 * sde.time(LARGEST_SIGMA)) / 1e6)


def checked_t0(t0: object, name: str = "t0") -> float:
    """`t0` as a float in (0, 1]. Raises OptionError."""
    return real(name, t0, 0, 1, with_low=False, hint="0.3 stays faithful, 0.6 gets realistic")


def checked_steps(steps: object, name: str = "steps") -> int:
    """`steps` as an int, at least 1. Raises OptionError."""
    return whole(name, steps, 1, MOST_STEPS, hint="20 is a good start")


def checked_spacing(spacing: object) -> str:
    """`spacing`, one of SPACINGS. Raises OptionError."""
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        raise OptionError(f"unknown spacing {spacing!r}", hint=f"choose one of {', '.join(SPACINGS)}")
    return spacing


def resolve_eta(sampler: str, eta: float | None) -> float | None:
    """η as the sampler uses it, None for a sampler without one. Raises OptionError."""
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise OptionError(f"unknown sampler {sampler!r}", hint=f"choose one of {', '.join(SAMPLERS)}")
    if eta is None:
        return DEFAULT_ETA.get(sampler)
    if sampler not in DEFAULT_ETA:
        raise OptionError(
            f"sampler {sampler} has no eta, and eta is {eta}", hint=f"eta goes with {' and '.join(DEFAULT_ETA)}"
        )
    highest = 1.0 if sampler == "ddim" else MOST_ETA
    return real("eta", eta, 0, highest, with_low=True, hint="0 is deterministic, 1 is the full noise")


def _respaced(spacing: str, high: float, low: float, steps: int) -> Floats:
    """`steps` levels from high down to low, then 0. Not falling where they have no room."""
    part = np.arange(steps) / (steps - 1)
    with np.errstate(all="ignore"):
        if spacing == "log-sigma":
            levels = np.exp(np.log(high) + part * (np.log(low) - np.log(high)))
        else:  # Karras et al. 2022, eq. 5
            ends = np.array((high, low)) ** (1 / KARRAS_RHO)
            levels = (ends[0] + part * (ends[1] - ends[0])) ** KARRAS_RHO
    levels[[0, -1]] = high, low  # themselves, not one rounding beside
    return np.append(levels, 0.0)


def _rows(sampler: str, variance_preserving: bool, eta: float, sigmas: Floats) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = []
    sigma_last = None  # the level before σ: two-step methods look back at it
    for sigma, sigma_next in pairwise(map(float, sigmas)):
        if sigma_next == 0:
            a, b, c, d = 0.0, 1.0, 0.0, 0.0  # the last step is x = D, without noise
        else:
            a, b, c, d = _coefficients(sampler, variance_preserving, eta, sigma, sigma_next, sigma_last)
        rows.append((sigma, a, b, c, d, sigma_next))
        sigma_last = sigma
    return rows


def _coefficients(
    sampler: str, variance_preserving: bool, eta: float, sigma: float, sigma_next: float, sigma_last: float | None
) -> tuple[float, float, float, float]:
    """a, b, c, d of one step that ends above σ = 0. Differences of squares are factored: no cancellation."""
    r = sigma_next / sigma
    drop = (sigma - sigma_next) * (sigma + sigma_next)  # σ² - σ'²
    d = 0.0
    match sampler:
        case "em":  # Meng et al. 2022, algorithm 1 (VE) and appendix C (VP)
            a, b = r**2, drop / sigma**2
            c = np.sqrt(drop * (1 + sigma_next**2) / (1 + sigma**2) if variance_preserving else drop)
        case "ancestral":  # the exact posterior: Ho et al. 2020, eq. 7
            a, b = r**2, drop / sigma**2
            c = r * np.sqrt(drop)
        case "ddim":  # Song, Meng, Ermon 2021, eq. 12 and 16
            up = eta * r * np.sqrt(drop)
            a = np.sqrt((sigma_next - up) * (sigma_next + up)) / sigma
            b, c = 1 - a, up
        case "dpmpp-2m-sde":  # Lu et al. 2022, DPM-Solver++(2M) SDE, midpoint as in k-diffusion
            h = -np.log(r)
            a, b = r ** (1 + eta), -np.expm1(-(1 + eta) * h)
            c = sigma_next * np.sqrt(-np.expm1(-2 * eta * h))
            if sigma_last is not None:
                d = 0.5 * b * h / np.log(sigma_last / sigma)
        case "er-sde":  # Cui et al. 2023, order 2, with their fifth noise scale function
            a = er_phi(sigma_next) / er_phi(sigma)
            b = 1 - a
            c = np.sqrt((sigma_next - a * sigma) * (sigma_next + a * sigma))
            if sigma_last is not None:
                integral = er_integral(sigma_next, sigma)
                d = (sigma_next - sigma + er_phi(sigma_next) * integral) / (sigma - sigma_last)
        case _:
            raise AssertionError(sampler)
    return float(a), float(b), float(c), float(d)


def er_phi(s: float) -> float:
    """φ(s) = s (e^(s^0.3) + 10)."""
    return float(s * (np.exp(s**0.3) + 10))


def er_integral(low: float, high: float) -> float:
    """∫ ds/φ(s) from low to high, in u = ln s, by Gauss-Legendre panels no wider than a quarter of u."""
    panels = max(1, int(np.ceil(4 * np.log(high / low))))
    edges = np.linspace(np.log(low), np.log(high), panels + 1)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges) / 2
    u: NDArray[np.float64] = edges[:-1, None] + half[:, None] * (1 + nodes)
    return float((half[:, None] * weights / (np.exp(np.exp(0.3 * u)) + 10)).sum())
