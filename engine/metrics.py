"""Realism and faithfulness in numbers: KID between sets of features, L2 between pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit.checks import whole
from sdedit.errors import OptionError
from sdedit.noise import checked_seed

SUBSET_SIZE, SUBSETS = 100, 100
MOST_SUBSETS = 100_000
BEYOND = 2  # a float pixel this large was not meant to be in [0, 1]; results that are not clipped pass it by a little
BLOCK = 1024  # rows of a kernel matrix that are held at once

Features = NDArray[Any]  # (N, F) of N pictures
Pictures = NDArray[Any]  # (N, H, W, C) uint8, or floats in [0, 1]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Kid:
    """A kernel inception distance, or the difference of two, and how surely it is known."""

    value: float
    standard_error: float
    subset_size: int  # pictures of each side in a subset
    subsets: int


def kid(a: Features, b: Features, *, subset_size: int = SUBSET_SIZE, subsets: int = SUBSETS, seed: int = 0) -> Kid:
    """KID between two sets of features, (N, F) and (M, F): the mean of `mmd2` over random subsets of both.

    Bińkowski et al. 2018, "Demystifying MMD GANs". standard_error is that of other pictures of the same kind: the
    delete-one jackknife (Efron & Stein 1981) of `mmd2` between all pictures, which the subsets' mean estimates, and
    the variance over subsets / subsets. Raises OptionError: too few pictures, or features of other shapes.
    """
    a, b = _checked(a, "first"), _checked(b, "second")
    draws = _subsets([a, b], subset_size, subsets, seed)
    return estimate(np.array([mmd2(a[i], b[j]) for i, j in draws]), _left_out(a, b), subset_size)


def kid_difference(
    a1: Features,
    a2: Features,
    real: Features,
    *,
    subset_size: int = SUBSET_SIZE,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> Kid:
    """KID(a1, real) − KID(a2, real) over the same subsets, and the standard error of the difference as `kid` has it.

    a1, a2: features (N, F) of results of the same N guides, in the same order: what both share cancels. Raises
    OptionError.
    """
    a1, a2, real = _checked(a1, "first"), _checked(a2, "second"), _checked(real, "real")
    if len(a1) != len(a2):
        raise OptionError(
            f"{len(a1)} and {len(a2)} pictures to compare in pairs", hint="give results of the same guides, in order"
        )
    draws = _subsets([a1, real], subset_size, subsets, seed)
    _require_same_width(a1, a2)
    differences = np.array([mmd2(a1[i], real[j]) - mmd2(a2[i], real[j]) for i, j in draws])
    without = [one - other for one, other in zip(_left_out(a1, real), _left_out(a2, real), strict=True)]
    return estimate(differences, without, subset_size)


def mmd2(a: Features, b: Features) -> float:
    """The unbiased squared maximum mean discrepancy of (N, F) and (M, F) with the kernel (x·y/F + 1)³.

    Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 3. It may be negative. N, M: at least 2.
    """
    n, m = len(a), len(b)
    aa, bb, ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def require_subsets(n: int, m: int, subset_size: int, subsets: int, seed: int) -> None:
    """Raise OptionError unless `kid` of n and m pictures can be made so."""
    whole("subset_size", subset_size, 3, 2**31, hint="100 is usual for some hundred pictures, 1000 for thousands")
    whole("subsets", subsets, 2, MOST_SUBSETS, hint="100 is usual")
    checked_seed(seed)
    if min(n, m) < subset_size:
        raise OptionError(
            f"KID over subsets of {subset_size} needs {subset_size} pictures on each side; there are {n} and {m}",
            hint=f"give at least {subset_size} pictures on both sides, or smaller subsets",
        )


def l2(guides: Pictures, results: Pictures, *, mask: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """√Σ(guide − result)² of each pair over all its values in [0, 1], as Meng et al. 2022 measure faithfulness. (N,)

    guides, results: (N, H, W, C) uint8, or floats in [0, 1]. mask: (N, H, W) or (H, W), 0 = keep; with one, only
    pixels count where it is 0: what changed outside the mask. Raises OptionError for others.
    """
    guides, results = np.asarray(guides), np.asarray(results)
    if guides.shape != results.shape or guides.ndim != 4:
        raise OptionError(
            f"guides are {guides.shape} and results {results.shape}; wanted (N, H, W, C) twice",
            hint="pair each result with its guide, at one size",
        )
    squares = (_unit(guides) - _unit(results)) ** 2
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape not in (guides.shape[:3], (1, *guides.shape[1:3]), guides.shape[1:3]):
            raise OptionError(
                f"mask is {mask.shape}; wanted {guides.shape[:3]} or {guides.shape[1:3]}",
                hint="a mask has its guide's size",
            )
        squares *= (mask == 0)[..., None]
    return np.asarray(np.sqrt(squares.sum(axis=(1, 2, 3))))


def _kernel(a: Features, b: Features) -> NDArray[np.float64]:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3, np.float64)


def _unit(pictures: Pictures) -> NDArray[np.float64]:
    if pictures.dtype == np.uint8:
        return pictures / 255.0
    if not np.issubdtype(pictures.dtype, np.floating) or not np.all(np.abs(pictures) < BEYOND):  # NaN neither
        raise OptionError(
            f"pictures are {pictures.dtype}, not uint8, and not floats in [0, 1]", hint="uint8 from 0 to 255 is usual"
        )
    return pictures.astype(np.float64)


def _checked(features: Features, which: str) -> NDArray[np.float64]:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise OptionError(
            f"the {which} features are {array.shape}; wanted (pictures, features)", hint="one row a picture"
        )
    if not np.isfinite(array).all():
        raise OptionError(f"the {which} features have NaN or Inf", hint="check the feature network's input range")
    return array


def _require_same_width(a: Features, b: Features) -> None:
    if a.shape[1] != b.shape[1]:
        raise OptionError(
            f"features of {a.shape[1]} and of {b.shape[1]} values", hint="use one feature network for all pictures"
        )


def _subsets(sets: list[Features], size: int, count: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    """Which pictures of both sets are in each subset. Raises OptionError."""
    _require_same_width(*sets)
    n, m = map(len, sets)
    require_subsets(n, m, size, count, seed)
    return drawn(n, m, size, count, seed)


def drawn(n: int, m: int, size: int, count: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    """Random subsets of n and of m pictures."""
    rng = np.random.default_rng(seed)
    return ((rng.permutation(n)[:size], rng.permutation(m)[:size]) for _ in range(count))


def _left_out(a: Features, b: Features) -> list[NDArray[np.float64]]:
    """`mmd2` of all pictures without the i-th of a, (N,), and without the j-th of b, (M,)."""
    rows_a, rows_b = (_row_sums(one, one) - _diagonal(one) for one in (a, b))
    return left_out(rows_a, rows_b, _row_sums(a, b), _row_sums(b, a))


def left_out(
    rows_a: NDArray[np.float64],
    rows_b: NDArray[np.float64],
    across_a: NDArray[np.float64],
    across_b: NDArray[np.float64],
) -> list[NDArray[np.float64]]:
    """`mmd2` without one picture, (N,) and (M,), from the kernel's sums over each one's row: with the others of its own
    set, without itself, and with the other set.
    """
    n, m = len(rows_a), len(rows_b)
    within_a, within_b, across = rows_a.sum(), rows_b.sum(), across_a.sum()

    def without_one(
        total: float, rows: NDArray[np.float64], other: float, shared: NDArray[np.float64], n: int, m: int
    ) -> NDArray[np.float64]:
        own = (total - 2 * rows) / ((n - 1) * (n - 2))
        return np.asarray(own + other / (m * (m - 1)) - 2 * (across - shared) / ((n - 1) * m))

    return [
        without_one(within_a, rows_a, within_b, across_a, n, m),
        without_one(within_b, rows_b, within_a, across_b, m, n),
    ]


def _row_sums(a: Features, b: Features) -> NDArray[np.float64]:
    """Σ_j k(a_i, b_j), a block of rows at a time: sets may be large."""
    blocks = (a[at : at + BLOCK] for at in range(0, len(a), BLOCK))
    return np.concatenate([_kernel(block, b).sum(axis=1) for block in blocks])


def _diagonal(a: Features) -> NDArray[np.float64]:
    return np.asarray(((a * a).sum(axis=1) / a.shape[1] + 1) ** 3)


def estimate(values: NDArray[np.float64], without: list[NDArray[np.float64]], size: int) -> Kid:
    """From the distances of subsets and those without one picture."""
    jackknife = sum((len(one) - 1) * one.var() for one in without)
    variance = jackknife + values.var(ddof=1) / len(values)
    return Kid(float(values.mean()), float(np.sqrt(variance)), size, len(values))
