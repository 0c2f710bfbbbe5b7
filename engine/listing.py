"""Which guides a folder has, and where the mask and the result of each one are."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdedit.errors import ImageError, OutputError
from sdedit.noise import file_seed
from sdedit.output import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class GuideFile:
    """One guide of the folder and where its result goes."""

    path: str  # below the folder, with slashes
    guide: Path
    masks: tuple[Path, ...]  # where its mask may be; empty for no masks
    target: Path
    output: str  # below the output folder, with slashes
    seed: int

    def mask(self) -> Path | None:
        """Raises ImageError where there should be a mask and is none."""
        return _existing(self.masks) if self.masks else None


def find_guides(source: Path, target: Path, masks: Path | None, seed: int) -> list[GuideFile]:
    """Every picture below `source`, by its path. Raises ImageError, OutputError."""
    for folder in (source, masks):
        if folder is not None and not folder.is_dir():
            raise ImageError(f"{folder}: no such folder", hint="name a folder of pictures")
    if not target.is_dir():
        raise OutputError(f"{target}: no such folder", hint="make the folder first")
    if not os.access(target, os.W_OK):
        raise OutputError(f"{target}: not writable", hint="choose a folder you may write to")
    for folder in (source, masks):
        if folder is not None and _nested(folder.resolve(), target.resolve()):
            raise OutputError(f"{target}: would mix results with {folder}", hint="choose a folder beside it")
    if masks is not None and masks.resolve().is_relative_to(source.resolve()):
        raise ImageError(f"{masks}: its masks would be edited with {source}", hint="put the masks beside the guides")
    files: dict[str, GuideFile] = {}
    for path in pictures_of(source):
        written = _written(path)
        if written in files:
            raise OutputError(
                f"{source}: {files[written].path} and {path} would both become {written}", hint="rename one of them"
            )
        files[written] = guide_file(source, target, masks, seed, path)
    return list(files.values())


def guide_file(source: Path, target: Path, masks: Path | None, seed: int, path: str) -> GuideFile:
    """The guide at `path` below `source`."""
    written = _written(path)
    where = () if masks is None else _mask_paths(masks, path)
    return GuideFile(path, source / path, where, target / written, written, file_seed(seed, path))


def _written(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(".png"))


def mask_of(masks: Path, path: str) -> Path:
    """The mask of the guide a/b.jpg: a/b.png, or else a/b.jpg, below `masks`. Raises ImageError if there is none."""
    if not masks.is_dir():
        raise ImageError(f"{masks}: no such folder", hint="name a folder of masks")
    return _existing(_mask_paths(masks, path))


def _mask_paths(masks: Path, path: str) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((masks / _written(path), masks / path)))


def _existing(masks: tuple[Path, ...]) -> Path:
    for path in masks:
        if path.exists():
            return path
    raise ImageError(f"{masks[0]}: no such mask", hint="every guide has a mask of its name in --masks")


def pictures_of(folder: Path) -> list[str]:
    """The pictures of a folder and its folders, sorted: paths below it, with slashes. Raises ImageError."""
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder", hint="name a folder of pictures")
    if not (found := sorted(_pictures(folder))):
        raise ImageError(f"{folder}: no pictures in it", hint=f"pictures end in {', '.join(SUFFIXES)}")
    return found


def _pictures(source: Path) -> Iterator[str]:
    """Paths below `source`, with slashes. Links to folders are not followed. Raises ImageError."""

    def fail(error: OSError) -> None:
        raise ImageError(f"{error.filename}: cannot be read: {reason(error)}", hint="check its permissions")

    for folder, _, names in os.walk(source, onerror=fail):
        below = Path(folder).relative_to(source)
        yield from ((below / name).as_posix() for name in names if name.lower().endswith(SUFFIXES))


def _nested(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
