"""Writing results: to a temporary file beside the target, then renamed; all of them or none."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import PngImagePlugin

from sdedit.errors import OutputError
from sdedit.image import Pixels, to_image
from sdedit.loop import Array
from sdedit.record import KEYWORD

Writer = Callable[[IO[bytes]], None]


def png(pixels: Pixels, record: dict[str, Any]) -> Writer:
    """A writer of (H, W, C) uint8 as PNG with its record."""

    def write(file: IO[bytes]) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text(KEYWORD, json.dumps(record, sort_keys=True))
        to_image(pixels).save(file, "PNG", pnginfo=text)

    return write


def npy(x: Array) -> Writer:
    """A writer of raw float32 (B, C, H, W) as .npy."""
    return lambda file: np.save(file, x, allow_pickle=False)


def check(paths: Sequence[Path], *, force: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError before any work if a path cannot or must not be written."""
    for path in paths:
        folder = path.parent
        if not folder.is_dir():
            raise OutputError(f"{folder}: no such folder", hint=f"mkdir -p '{folder}'")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", hint="name a file: OUT.png or OUT.npy")
        if path.exists():
            if any(path.samefile(given) for given in inputs if given.exists()):
                raise OutputError(f"{path}: would overwrite an input", hint="choose another name")
            if not force:
                raise OutputError(f"{path}: exists already", hint="choose another name, or --force to replace it")
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder}: not writable", hint="choose a folder you may write to")


def write_all(outputs: Sequence[tuple[Path, Writer]]) -> None:
    """Write every file, or none. Raises OutputError."""
    partial: list[tuple[str, Path]] = []
    try:
        for path, write in outputs:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            partial.append((name, path))
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.chmod(name, 0o666 & ~_umask())
        while partial:
            os.replace(*partial[0])
            partial.pop(0)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}", hint="check the disk and the permissions"
        ) from error
    finally:
        for name, _ in partial:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
