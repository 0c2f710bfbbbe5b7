"""The library of operators that the package ships for ONNX Runtime's CPU provider.

It is for Linux on x86-64 with AVX2 or AVX-512, and uses the best that there is. Anywhere else, and with
SDEDIT_OPERATORS=off, ONNX Runtime's own operators compute the same network, more slowly.
"""

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path

from sdedit.errors import OptionError

VARIABLE = "SDEDIT_OPERATORS"
LIBRARY = Path(__file__).with_name("liboperators.so")
UNITS = {6: "AVX-512 with FP16", 5: "AVX-512 with BF16", 4: "AVX-512", 3: "AVX2"}  # x86-64-v4, x86-64-v3
HALVES = {6: "fp16", 5: "bf16"}  # the half precision of those that have one
OFF, NONE = f"off, by {VARIABLE}", "none: they are for Linux on x86-64 with AVX2"


def usable_library() -> Path | None:
    """What a session is to register; None where ONNX Runtime does it all itself. Raises OptionError (the variable)."""
    wanted = os.environ.get(VARIABLE) or "on"
    if wanted not in ("on", "off"):
        raise OptionError(f"{VARIABLE} is {wanted!r}", hint="set it to on or off, or not at all")
    return LIBRARY if wanted == "on" and _vector_unit() else None


@cache
def version() -> str:
    """Which library and vector unit these are, for records: the bytes of results may change with them."""
    return f"{hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:12]} {UNITS[_vector_unit()]}"


def half() -> str | None:
    """The half precision in which the operators can multiply here: "fp16", "bf16" or none. Raises OptionError."""
    return HALVES.get(_vector_unit()) if usable_library() is not None else None


def vector_unit() -> str:
    """What the operators are computed with here, or why ONNX Runtime does it all. Raises OptionError."""
    if usable_library() is not None:
        return UNITS[_vector_unit()]
    return OFF if _vector_unit() else NONE


@cache
def _vector_unit() -> int:
    """A key of UNITS; 0 where there is none of them."""
    try:
        return int(ctypes.CDLL(str(LIBRARY)).sdedit_use_vector_unit(max(UNITS)))
    except OSError:  # another system or processor
        return 0
