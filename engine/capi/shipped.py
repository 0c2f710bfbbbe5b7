"""The library behind sdedit.h that the package ships, as the engine uses it: noise and steps, compiled.

It is for Linux on x86-64 and needs nothing, not even a C library. Where it does not load, NumPy makes the same bits,
more slowly; SDEDIT_NOISE=numpy or compiled forces one of them.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from sdedit.errors import BackendUnavailable, OptionError

VARIABLE = "SDEDIT_NOISE"
COMPILED, NUMPY = MAKERS = ("compiled", "numpy")
LIBRARY = Path(__file__).with_name("libsdedit.so")
INTERFACE = 1  # SDEDIT_C_INTERFACE


def open_library() -> ctypes.CDLL | None:
    """The library, whose functions let other Python threads run; None where NumPy is to do its work.

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
    return NUMPY if open_library() is None else COMPILED


@cache
def _load() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:  # another system or processor
        return None
    if found.sdedit_interface() != INTERFACE:  # of another version of the package
        return None
    # seed, step, repeat, stream, elements, out
    found.sdedit_normals.argtypes = [ctypes.c_uint64, *[ctypes.c_uint32] * 4, ctypes.c_void_p]
    found.sdedit_normals.restype = None
    found.sdedit_step.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]  # batch, step, repeat
    return found
