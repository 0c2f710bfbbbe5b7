"""Folders of pictures that belong together: a/b.jpg in one is a/b.png in another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sdedit import image
from sdedit.errors import ImageError
from sdedit.image import Pixels
from sdedit.listing import pictures_of

Size = tuple[int, int]  # width, height

NAMED = 3  # of the names that lack a partner, how many an error tells


@dataclass(frozen=True)
class PictureFolder:
    """The pictures below a folder by their name without suffix, all of one size."""

    folder: Path
    files: dict[str, Path]
    size: tuple[int, int]  # width, height

    def __len__(self) -> int:
        return len(self.files)

    def read(self, names: Sequence[str], *, frame: Size | None = None, masks: bool = False) -> Pixels:
        """(N, H, W, 3) uint8, or 1 for masks. frame: width and height, where pictures of another size are fitted into
        it as the engine fits guides, the centred crop. Raises ImageError, also where one has another size than others.
        """
        made = []
        for name in names:
            picture = image.read(self.files[name], *((1, "mask") if masks else (3, "picture")))
            if picture.size != self.size:
                raise other_size(self.files[name], picture.size, self.size)
            if frame is None or frame == self.size:
                made.append(picture.pixels)
            else:
                made.append(image.to_pixels(image.to_model(picture, image.place(picture, frame, "crop"))))
        return np.stack(made)


def other_size(path: Path, found: Size, wanted: Size) -> ImageError:
    """The error for a picture that cannot be compared."""
    return ImageError(
        f"{path}: is {found[0]}x{found[1]}, others are {wanted[0]}x{wanted[1]}",
        hint=f"all guides have one size, and all pictures that are compared with them: scale them first, "
        f"to {wanted[0]}x{wanted[1]} say",
    )


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
    first = min(files)
    return PictureFolder(folder, dict(sorted(files.items())), image.read(files[first], 3, "picture").size)


def require_size(folder: PictureFolder, size: Size) -> None:
    """Raise ImageError unless its pictures have this width and height."""
    if folder.size != size:
        raise other_size(next(iter(folder.files.values())), folder.size, size)


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
