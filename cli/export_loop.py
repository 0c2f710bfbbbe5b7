"""`sdedit export --loop`: an artifact becomes the whole edit in one ONNX file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sdedit.cli.arguments import add_schedule, positive
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json, say
from sdedit.errors import OptionError

OPTIONS = ("t0", "steps", "sampler", "eta", "repeats", "mask", "noise")  # of --loop alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the whole edit of one of our artifacts in one file, for hosts without Python")
    group.add_argument(
        "--loop", action="store_true",
        help="write an ONNX file with inputs guide and seed, output image (SOURCE: an artifact; default: the bundled)",
    )  # fmt: skip
    add_schedule(group)
    group.add_argument("--repeats", type=positive, metavar="K", help="passes, each from the last one's result")
    group.add_argument("--mask", action="store_true", help="with a further input, mask")
    group.add_argument(
        "--noise", metavar="N", help="graph (default): made inside from the seed; input: given, for TensorRT"
    )


def require_unused(arguments: argparse.Namespace) -> None:
    """Raise OptionError for an option of --loop, which is not there."""
    for name in OPTIONS:
        if getattr(arguments, name) not in (None, False):
            raise OptionError(f"--{name} goes with --loop", hint="sdedit export --loop MODEL.onnx -o EDIT.onnx")


def run(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """others: the flags of an export without --loop."""
    from sdedit import artifact
    from sdedit.cli.export import import_export, require_none
    from sdedit.editor import EditOptions

    require_none(arguments, others, "--loop")
    if arguments.family not in ("auto", "artifact"):
        raise OptionError(f"--loop takes one of our artifacts, not {arguments.family}", hint="leave --family out")
    forms = arguments.guide or ["uint8"]
    if len(forms) > 1:
        raise OptionError("--guide is given more than once", hint="with --loop it is the form of the input")
    given = {name: getattr(arguments, name) for name in ("t0", "steps", "sampler", "eta")}
    repeats = 1 if arguments.repeats is None else arguments.repeats
    import_export()
    from sdedit.export import loop_graph

    opened = artifact.read(Path(arguments.source) if arguments.source else artifact.BUNDLED)
    options = EditOptions(**given, repeats=repeats).resolved(opened.defaults)
    metadata = loop_graph.write(
        opened, Path(arguments.output), options.schedule(), repeats=options.repeats, mask=arguments.mask,
        guide=forms[0], noise=arguments.noise or "graph", force=arguments.force,
    )  # fmt: skip
    say(f"the edit of {opened.name}: t0 {options.t0:g}, {options.steps} steps, {options.sampler}")
    if arguments.json:
        print_json({"output": arguments.output, loop_graph.PROPERTY: metadata})
    else:
        print(arguments.output)
    return OK
