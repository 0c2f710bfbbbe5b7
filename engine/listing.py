"""Which guides a folder has, and what the mask and the result of each one are called."""

import os
from collections.abc import Iterable, Iterator
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
    output: str  # below the output folder, with slashes
    seed: int


def guide_files(source: Path | str, paths: Iterable[str], seed: int) -> list[GuideFile]:
    """The guides at these paths below `source`. Raises OutputError where two have one result."""
    files: dict[str, GuideFile] = {}
    for path in paths:
        file = guide_file(path, seed)
        if file.output in files:
            raise OutputError(
                f"{source}: {files[file.output].path} and {path} would both become {file.output}",
                hint="rename one of them",
            )
        files[file.output] = file
    return list(files.values())


def guide_file(path: str, seed: int) -> GuideFile:
    """The guide at `path`. seed: of the job."""
    return GuideFile(path, _written(path), file_seed(seed, path))


def _written(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(".png"))


def mask_of(masks: Path, path: str) -> Path:
    """The mask of the guide a/b.jpg: a/b.png, or else a/b.jpg, below `masks`. Raises ImageError if there is none."""
    if not masks.is_dir():
        raise ImageError(f"{masks}: no such folder", hint="name a folder of masks")
    return existing_mask(masks, path)


def existing_mask(masks: Path, path: str) -> Path:
    """`mask_of` where the folder was checked already. Raises ImageError."""
    names = mask_names(path)
    for name in names:
        if (masks / name).exists():
            return masks / name
    raise no_mask(masks / names[0])


def mask_names(path: str) -> tuple[str, ...]:
    """What the mask of the guide at `path` may be called, the first that there is."""
    return tuple(dict.fromkeys((_written(path), path)))


def no_mask(where: Path | str) -> ImageError:
    """The error that there is no mask `where` one should be."""
    return ImageError(f"{where}: no such mask", hint="every guide has a mask of its name in --masks")


def pictures_of(folder: Path) -> list[str]:
    """The pictures of a folder and its folders, sorted: paths below it, with slashes. Raises ImageError."""
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder", hint="name a folder of pictures")
    return chosen_pictures(folder, _files(folder))


def chosen_pictures(folder: Path | str, paths: Iterable[str]) -> list[str]:
    """The pictures among the paths of a folder's files, sorted. Raises ImageError if there are none."""
    if not (found := sorted(path for path in paths if path.lower().endswith(SUFFIXES))):
        raise ImageError(f"{folder}: no pictures in it", hint=f"pictures end in {', '.join(SUFFIXES)}")
    return found


def _files(source: Path) -> Iterator[str]:
    """Paths below `source`, with slashes. Links to folders are not followed. Raises ImageError."""

    def fail(error: OSError) -> None:
        raise ImageError(f"{error.filename}: cannot be read: {reason(error)}", hint="check its permissions")

    for folder, _, names in os.walk(source, onerror=fail):
        below = Path(folder).relative_to(source)
        yield from ((below / name).as_posix() for name in names)
