"""`sdedit strokes`: photographs in, simulated stroke paintings out."""

import argparse
from pathlib import Path

from sdedit.cli.arguments import add_json
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json, say
from sdedit.errors import OptionError

HELP = "make guides of photographs: the paper's simulated stroke paintings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="a photograph")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="OUT.png (of several photographs: OUT-000.png …), or a folder: paintings named as the photographs",
    )  # fmt: skip
    parser.add_argument("--colors", type=int, default=6, metavar="N", help="colours of the palette (default 6)")
    parser.add_argument(
        "--kernel", type=int, default=23, metavar="K",
        help="width of the median filter on a 256x256 picture; scaled with the shorter side (default 23)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sdedit import image, output
    from sdedit.painting import strokes

    photos = [Path(photo) for photo in arguments.photos]
    paths = painting_paths(photos, Path(arguments.output))
    output.check(paths, force=arguments.force, inputs=photos)
    outputs = []
    for photo, path in zip(photos, paths, strict=True):
        read = image.read(photo, 3, role="photo")
        for note in read.notes:
            say(note)
        painting = strokes(read.pixels, colors=arguments.colors, kernel=arguments.kernel)
        outputs.append((path, output.png(np.asarray(painting), profile=read.profile)))
    output.write_all(outputs, force=arguments.force)
    if arguments.json:
        print_json({"outputs": [str(path) for path in paths]})
    else:
        print(*paths, sep="\n")
    return OK


def painting_paths(photos: list[Path], target: Path) -> list[Path]:
    """Where each painting goes. Raises OptionError."""
    from sdedit.cli.edit import output_paths

    if not target.is_dir():
        return output_paths(target, len(photos), (".png",))
    paths = [target / f"{photo.stem}.png" for photo in photos]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise OptionError(f"two photographs would become {twice[0]}", hint="rename one, or paint them one at a time")
    return paths
