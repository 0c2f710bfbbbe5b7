"""Where this machine keeps what can be made again: plans, optimised graphs."""

import os
import sys
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of file: below SDEDIT_CACHE, else below the platform's cache folder.

    For a user without a home it is one that cannot be made: nothing is kept, and nothing found.
    """
    if given := os.environ.get("SDEDIT_CACHE"):
        return Path(given) / kind
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(base) / "sdedit" / kind


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)
