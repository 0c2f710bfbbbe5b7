"""Options as the numbers they must be: Python's or NumPy's in, Python's out."""

import numpy as np

from sdedit.errors import OptionError


def whole(name: str, value: object, low: int, high: int, *, hint: str) -> int:
    """`value` as an int in [low, high]. Raises OptionError."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise OptionError(f"{name} is {value!r}; wanted a whole number from {low} to {high}", hint=hint)


def real(name: str, value: object, *, above: float, to: float, hint: str) -> float:
    """`value` as a float in (above, to]. Raises OptionError."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and above < value <= to:
        return float(value)
    if isinstance(value, float | np.floating) and above < float(value) <= to:
        return float(value)
    raise OptionError(f"{name} is {value!r}; wanted a number in ({above:g}, {to:g}]", hint=hint)
