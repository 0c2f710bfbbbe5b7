"""`sdedit.kid` and `sdedit.kid_difference` from kernel matrices that are held whole: for some thousand pictures much
faster, as every subset is a sum over parts of them. The same values, up to rounding.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

import sdedit
from sdedit import metrics

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gram:
    """The kernel within and between two sets of features: k(a, a) (N, N), k(b, b) (M, M), k(a, b) (N, M)."""

    aa: Matrix
    bb: Matrix
    ab: Matrix

    def distances(self, size: int, subsets: int, seed: int) -> NDArray[np.float64]:
        """`mmd2` of random subsets, those that `sdedit.kid` draws. Raises OptionError."""
        n, m = self.ab.shape
        metrics.require_subsets(n, m, size, subsets, seed)
        in_a, in_b = np.zeros((subsets, n)), np.zeros((subsets, m))
        for number, (i, j) in enumerate(metrics.drawn(n, m, size, subsets, seed)):
            in_a[number, i] = in_b[number, j] = 1
        within = [
            ((chosen @ k) * chosen).sum(axis=1) - chosen @ k.diagonal()
            for chosen, k in ((in_a, self.aa), (in_b, self.bb))
        ]
        across = ((in_a @ self.ab) * in_b).sum(axis=1)
        return np.asarray(sum(within) / (size * (size - 1)) - 2 * across / size**2)

    @cached_property
    def left_out(self) -> list[NDArray[np.float64]]:
        """`mmd2` without one picture."""
        within = (k.sum(axis=1) - k.diagonal() for k in (self.aa, self.bb))
        return metrics.left_out(*within, self.ab.sum(axis=1), self.ab.sum(axis=0))


class Beside:
    """One set of features, and the kernels of others beside it: what is within it is computed once."""

    def __init__(self, features: NDArray[np.floating]) -> None:
        self._features, self._within = features, kernel(features, features)

    def __call__(self, others: NDArray[np.floating]) -> Gram:
        return Gram(kernel(others, others), self._within, kernel(others, self._features))


def kernel(a: NDArray[np.floating], b: NDArray[np.floating]) -> Matrix:
    """(x·y/F + 1)³ of (N, F) and (M, F)."""
    k = np.float64(a) @ np.float64(b).T / a.shape[1] + 1
    return np.asarray(k * k * k)  # ** would call pow


def kid(gram: Gram, *, subset_size: int, subsets: int, seed: int = 0) -> sdedit.Kid:
    return metrics.estimate(gram.distances(subset_size, subsets, seed), gram.left_out, subset_size)


def kid_difference(one: Gram, other: Gram, *, subset_size: int, subsets: int, seed: int = 0) -> sdedit.Kid:
    """Of two sets of results of the same guides, to the same pictures."""
    distances = [gram.distances(subset_size, subsets, seed) for gram in (one, other)]
    without = [a - b for a, b in zip(one.left_out, other.left_out, strict=True)]
    return metrics.estimate(distances[0] - distances[1], without, subset_size)
