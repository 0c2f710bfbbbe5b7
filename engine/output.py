"""Writing results: to temporary folders beside the targets, then renamed; all of them or none."""

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import PngImagePlugin

from sdedit.errors import OutputError
from sdedit.image import Pixels, to_image
from sdedit.loop import Array
from sdedit.record import KEYWORD

Writer = Callable[[IO[bytes]], None]


def png(pixels: Pixels, record: dict[str, Any] | None = None, profile: bytes | None = None) -> Writer:
    """A writer of (H, W, C) uint8 as PNG, with its record and ICC profile if it has them."""

    def write(file: IO[bytes]) -> None:
        text = PngImagePlugin.PngInfo()
        if record is not None:
            text.add_text(KEYWORD, json.dumps(record, sort_keys=True))
        to_image(pixels).save(file, "PNG", pnginfo=text, icc_profile=profile)

    return write


def npy(x: Array) -> Writer:
    """A writer of raw float32 (B, C, H, W) as .npy."""

    def write(file: IO[bytes]) -> None:
        encoded = io.BytesIO()  # NumPy does not notice a full disk when it writes to a file itself
        np.save(encoded, x, allow_pickle=False)
        file.write(encoded.getbuffer())

    return write


def check(paths: Sequence[Path], *, force: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError before any work if a path cannot or must not be written."""
    for path in paths:
        try:
            _check(path, force, inputs)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {reason(error)}", hint="choose another name") from error


def _check(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder", hint="make the folder first")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder", hint="name a file: OUT.png or OUT.npy")
    if path.exists() and any(path.samefile(given) for given in inputs if given.exists()):
        raise OutputError(f"{path}: would overwrite an input", hint="choose another name")
    if os.path.lexists(path) and not force:
        raise _exists(path)
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: not writable", hint="choose a folder you may write to")


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path}: exists already", hint="choose another name, or --force to replace it")


def write_all(outputs: Sequence[tuple[Path, Writer]], *, force: bool) -> None:
    """Write every file, or none and leave what was there. force: replaces files. Raises OutputError."""
    paths = [path for path, _ in outputs]
    current = paths[0]
    try:
        with ExitStack() as stack:
            scratch = {path.parent: "" for path in paths}  # a folder beside the targets, from which they are renamed
            for folder in scratch:
                scratch[folder] = stack.enter_context(tempfile.TemporaryDirectory(prefix=".sdedit-", dir=folder))
            for number, (current, write) in enumerate(outputs):
                with open(os.path.join(scratch[current.parent], f"new-{number}"), "wb") as file:
                    write(file)
            _exchange([(path, scratch[path.parent]) for path in paths], force)
    except OSError as error:
        raise OutputError(
            f"{current}: cannot be written: {reason(error)}", hint="check the disk and the permissions"
        ) from error


def replace(path: Path, write: Writer) -> None:
    """Write one file, new or again; who reads it meanwhile gets it old or new, and whole. Raises OutputError."""
    try:
        with tempfile.TemporaryDirectory(prefix=".sdedit-", dir=path.parent) as scratch:
            whole = os.path.join(scratch, "new")
            with open(whole, "wb") as file:
                write(file)
            os.replace(whole, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {reason(error)}", hint="check the disk and the permissions"
        ) from error


def _exchange(files: Sequence[tuple[Path, str]], force: bool) -> None:
    """Put the new files in place and the old ones into their scratch folders; back again if that fails halfway.

    Without `force` a file that another process made meanwhile is left alone: OutputError.
    """
    begun = []
    try:
        for number, (path, scratch) in enumerate(files):
            new, old = (os.path.join(scratch, f"{kind}-{number}") for kind in ("new", "old"))
            if not force:
                _place(new, path)
                begun.append((path, old, False))
                continue
            begun.append((path, old, os.path.lexists(path)))
            if begun[-1][2]:
                os.rename(path, old)
            os.replace(new, path)
    except BaseException:
        for path, old, existed in begun:
            if os.path.lexists(old):
                os.replace(old, path)
            elif not existed:
                path.unlink(missing_ok=True)
        raise


def _place(new: str, path: Path) -> None:
    """Move a file to a name that is free, and only there: who comes second is told, however close."""
    try:
        with suppress(OSError):  # on a file system without links
            os.link(new, path)
            return
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # the name is ours
    except FileExistsError:
        raise _exists(path) from None
    os.replace(new, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {reason(error)}", hint="check the disk and the permissions"
        ) from error


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at this name: what is locked may have been removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def reason(error: OSError) -> str:
    """Why, in the system's words or else the raiser's."""
    return error.strerror or str(error)
