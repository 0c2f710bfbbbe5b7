"""Options as the numbers they must be: Python's or NumPy's in, Python's out."""

import numpy as np

from sdedit.errors import OptionError

Number = int | float | np.integer | np.floating


def whole(name: str, value: object, low: int, high: int, *, hint: str) -> int:
    """`value` as an int in [low, high]. Raises OptionError."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise OptionError(f"{name} is {value!r}; wanted a whole number from {low} to {high}", hint=hint)


def real(name: str, value: object, low: float, high: float, *, with_low: bool, hint: str) -> float:
    """`value` as a float in (low, high], or in [low, high] with_low. Raises OptionError."""
    if isinstance(value, Number) and not isinstance(value, bool):
        inside = low < value <= high or (with_low and value == low)
        if inside:
            return float(value)
    bracket = "[" if with_low else "("
    raise OptionError(f"{name} is {value!r}; wanted a number in {bracket}{low:g}, {high:g}]", hint=hint)
