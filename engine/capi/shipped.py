"""The library behind sdedit.h that the package ships, as the engine uses it: the noise, compiled.

It is for Linux on x86-64 and needs nothing, not even a C library. Where it does not load, NumPy makes the same bits,
more slowly; SDEDIT_NOISE=numpy or compiled forces one of them.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sdedit.errors import BackendUnavailable, OptionError

VARIABLE = "SDEDIT_NOISE"
COMPILED, NUMPY = MAKERS = ("compiled", "numpy")
LIBRARY = Path(__file__).with_name("libsdedit.so")
INTERFACE = 1  # SDEDIT_C_INTERFACE

Normals = Callable[[int, int, int, int, int, int], None]  # seed, step, repeat, stream, elements, address of the first


def normals() -> Normals | None:
    """`sdedit_normals`, which lets other Python threads run; None where NumPy is to make the noise.

    Raises OptionError (the variable), BackendUnavailable (it asks for what does not load).
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, *MAKERS):
        raise OptionError(f"{VARIABLE} is {wanted!r}", hint=f"set it to {COMPILED} or {NUMPY}, or not at all")
    found = None if wanted == NUMPY else _load()
    if wanted == COMPILED and found is None:
        raise BackendUnavailable(
            f"{LIBRARY.name} does not load here", hint=f"it is for Linux on x86-64; leave {VARIABLE} out for NumPy"
        )
    return found


def noise_maker() -> str:
    """What makes the noise of edits on this host: compiled (the shipped library) or numpy; the bits are the same.

    Raises OptionError, BackendUnavailable: the variable SDEDIT_NOISE.
    """
    return NUMPY if normals() is None else COMPILED


@cache
def _load() -> Normals | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # another system or processor
        return None
    if library.sdedit_interface() != INTERFACE:  # of another version of the package
        return None
    function = library.sdedit_normals
    function.argtypes = [ctypes.c_uint64, *[ctypes.c_uint32] * 4, ctypes.c_void_p]
    function.restype = None
    return function
