"""`sdedit compose`: rectangles of pictures onto a picture, as a guide and its mask."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sdedit.cli.arguments import add_json
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.collage import Patch

HELP = "make a collage: copy rectangles of pictures onto a picture, and write the mask of what to repaint"
FORM = "SOURCE@X,Y,WIDTH,HEIGHT, in whole pixels, then :X,Y where it goes to another place"
PATCH = re.compile(r"(.+)@(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})(?::(\d{1,6}),(\d{1,6}))?", re.ASCII | re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the picture that patches are copied onto")
    parser.add_argument(
        "--patch", action="append", required=True, metavar="SOURCE@X,Y,W,H[:DX,DY]",
        help="copy the W by H pixels from X,Y of SOURCE (TARGET itself, say) to DX,DY (default: X,Y); may be repeated",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="GUIDE", help="the collage, GUIDE.png")
    parser.add_argument("--mask-out", metavar="MASK", help="the mask, MASK.png: white where patches lie")
    parser.add_argument(
        "--grow", type=int, default=0, metavar="N", help="let the mask be white N pixels around each patch too"
    )
    parser.add_argument(
        "--feather", type=int, default=0, metavar="N", help="let the mask fade to black over N pixels more"
    )
    parser.add_argument(
        "--blend", metavar="B", help="poisson or laplacian: write a classical composite instead, to compare with"
    )
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sdedit import output
    from sdedit.cli.edit import output_paths
    from sdedit.collage import compose

    patches = [parse_patch(text) for text in arguments.patch]
    named = [(flag, name) for flag, name in (("-o", arguments.output), ("--mask-out", arguments.mask_out)) if name]
    paths = [path for flag, name in named for path in output_paths(Path(name), 1, (".png",), flag=flag)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise OptionError(f"{paths[0]}: is named for the collage and for the mask", hint="choose another name for one")
    inputs = [Path(arguments.target), *(Path(str(patch.source)) for patch in patches)]
    output.check(paths, force=arguments.force, inputs=inputs)
    made = compose(arguments.target, patches, grow=arguments.grow, feather=arguments.feather, blend=arguments.blend)
    for note in made.notes:
        say(note)
    pictures = (
        output.png(np.atleast_3d(np.asarray(picture)), profile=picture.info.get("icc_profile"))
        for picture in (made.guide, made.mask)
    )
    output.write_all(list(zip(paths, pictures, strict=False)), force=arguments.force)
    if arguments.json:
        print_json({"guide": arguments.output, "mask": arguments.mask_out, "notes": made.notes})
    else:
        print(*paths, sep="\n")
    return OK


def parse_patch(text: str) -> "Patch":
    """A patch as it is written on the command line. Raises OptionError."""
    from sdedit.collage import Patch

    found = PATCH.fullmatch(text)
    if found is None:
        raise OptionError(f"--patch {text}: is not {FORM}", hint="--patch church.png@120,40,64,48:30,100")
    x, y, width, height = (int(number) for number in found.groups()[1:5])
    to = None if found[6] is None else (int(found[6]), int(found[7]))
    return Patch(found[1], x, y, width, height, to)
