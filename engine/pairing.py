"""Folders of pictures that belong together: a/b.jpg in one is a/b.png in another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sdedit import image
from sdedit.errors import ImageError
from sdedit.image import Pixels
from sdedit.listing import pictures_of

NAMED = 3  # of the names that lack a partner, how many an error tells


@dataclass(frozen=True)
class PictureFolder:
    """The pictures below a folder by their name without suffix, all of one size."""

    folder: Path
    files: dict[str, Path]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, names: Sequence[str], size: tuple[int, int], *, masks: bool = False) -> Pixels:
        """(N, H, W, 3) uint8, or 1 for masks. size: the width and height each must have. Raises ImageError."""
        made = []
        for name in names:
            picture = image.read(self.files[name], *((1, "mask") if masks else (3, "picture")))
            if picture.size != size:
                raise ImageError(
                    f"{self.files[name]}: is {picture.size[0]}x{picture.size[1]}, others are {size[0]}x{size[1]}",
                    hint="all pictures that are compared have one size: scale them first",
                )
            made.append(picture.pixels)
        return np.stack(made)


def open_folder(folder: Path) -> PictureFolder:
    """Raises ImageError: no folder, no pictures, two of one name."""
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder", hint="name a folder of pictures")
    files: dict[str, Path] = {}
    for path in pictures_of(folder):
        name = str(PurePosixPath(path).with_suffix(""))
        if name in files:
            raise ImageError(
                f"{folder}: {files[name].name} and {Path(path).name} have one name", hint="rename or remove one of them"
            )
        files[name] = folder / path
    return PictureFolder(folder, dict(sorted(files.items())))


def size_of(folder: PictureFolder) -> tuple[int, int]:
    """Width and height of the first picture. Raises ImageError."""
    return image.read(next(iter(folder.files.values())), 3, "picture").size


def require_pairs(first: PictureFolder, other: PictureFolder) -> None:
    """Raise ImageError unless both have the same names."""
    for missing_in, has in ((other, first), (first, other)):
        if missing := sorted(set(has.files) - set(missing_in.files)):
            some = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
            raise ImageError(
                f"{missing_in.folder}: has no {some}, which {has.folder} has",
                hint="pictures are paired by their names without suffix: give both folders the same",
            )


def chunks(names: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """The names, `count` at a time: folders may be larger than memory."""
    return (names[at : at + count] for at in range(0, len(names), count))
