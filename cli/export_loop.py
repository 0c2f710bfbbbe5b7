"""`sdedit export --loop` and `--triton`: an artifact becomes the whole edit in one ONNX file, alone or to be served."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import SCHEDULE, add_schedule, positive
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.artifact import Artifact
    from sdedit.options import EditOptions

OPTIONS = (*SCHEDULE, "repeats", "mask", "noise")  # of a whole edit alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the whole edit of one of our artifacts in one file, for hosts without Python")
    group.add_argument(
        "--loop", action="store_true",
        help="write an ONNX file with inputs guide and seed, output image (SOURCE: an artifact; default: the bundled)",
    )  # fmt: skip
    group.add_argument(
        "--triton", metavar="REPO",
        help="write it as a model of Triton Inference Server, REPO/NAME/…, instead of -o; backend onnxruntime. Of a "
        "SOURCE.plan: the network alone, backend tensorrt",
    )  # fmt: skip
    group.add_argument(
        "--max-batch", type=positive, metavar="N", help="with --triton: requests served at once (default 8)"
    )
    add_schedule(group)
    group.add_argument("--repeats", type=positive, metavar="K", help="passes, each from the last one's result")
    group.add_argument("--mask", action="store_true", help="with a further input, mask")
    group.add_argument(
        "--noise", metavar="N", help="graph (default): made inside from the seed; input: given, for TensorRT"
    )


def require_unused(arguments: argparse.Namespace) -> None:
    """Raise OptionError for an option of --loop or --triton, which are not there."""
    for name in OPTIONS:
        if getattr(arguments, name) not in (None, False):
            raise OptionError(f"--{name} goes with --loop", hint="sdedit export --loop MODEL.onnx -o EDIT.onnx")
    require_no_batch(arguments)


def require_no_batch(arguments: argparse.Namespace) -> None:
    if arguments.max_batch is not None:
        raise OptionError("--max-batch goes with --triton", hint="sdedit export --triton REPO MODEL.onnx")


def run(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """others: the flags of an export without --loop."""
    require_no_batch(arguments)
    opened, options, guide = read(arguments, others, "--loop")
    from sdedit.export import loop_graph

    metadata = loop_graph.write(
        opened, Path(arguments.output), options.schedule(), repeats=options.repeats, mask=arguments.mask,
        guide=guide, noise=arguments.noise or "graph", force=arguments.force,
    )  # fmt: skip
    show(arguments, opened, options, arguments.output, metadata)
    return OK


def run_triton(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """others: the flags of an export without --loop. The name is the model's in Triton."""
    if arguments.source is not None and arguments.source.endswith(".plan"):
        return run_triton_plan(arguments, others)
    if arguments.noise not in (None, "graph"):
        raise OptionError(
            "--noise is not for --triton: given noise has the batch as its second dimension, and Triton batches the "
            "first", hint="leave it out: the noise is made inside, from the seed",
        )  # fmt: skip
    opened, options, guide = read(arguments, (*(name for name in others if name != "name"), "output"), "--triton")
    from sdedit.export import triton

    folder, metadata = triton.write(
        opened, Path(arguments.triton), options.schedule(), name=arguments.name,
        max_batch=arguments.max_batch or triton.MAX_BATCH, repeats=options.repeats, mask=arguments.mask, guide=guide,
        force=arguments.force,
    )  # fmt: skip
    show(arguments, opened, options, str(folder), metadata)
    return OK


def run_triton_plan(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """The denoiser of a TensorRT plan. The name is the model's in Triton."""
    from sdedit.cli.export import require_none
    from sdedit.export import triton_plan
    from sdedit.tensorrt import plan as plans

    named = (*(name for name in others if name != "name"), "output", "loop", "max_batch", "guide", *OPTIONS)
    require_none(arguments, named, "a plan, which is the network alone, for its own batches")
    plan = plans.read(Path(arguments.source))
    folder = triton_plan.write(
        plan.path, plan.sidecar, plan.artifact, Path(arguments.triton), name=arguments.name, force=arguments.force
    )
    least, _, most = plan.profile
    say(
        f"the network of {plan.artifact.name}: TensorRT {plan.version}, {', '.join(plan.targets)}, batch {least}:{most}"
    )
    if arguments.json:
        print_json({"output": str(folder), triton_plan.PARAMETER: plan.sidecar})
    else:
        print(folder)
    return OK


def read(arguments: argparse.Namespace, others: Sequence[str], what: str) -> "tuple[Artifact, EditOptions, str]":
    """The artifact, the options of its edit and the form of the guide. Raises OptionError for any of `others`."""
    from sdedit import artifact
    from sdedit.cli.export import import_export, require_none
    from sdedit.options import EditOptions

    require_none(arguments, others, what)
    if arguments.family not in ("auto", "artifact"):
        raise OptionError(f"{what} takes one of our artifacts, not {arguments.family}", hint="leave --family out")
    forms = arguments.guide or ["uint8"]
    if len(forms) > 1:
        raise OptionError("--guide is given more than once", hint=f"with {what} it is the form of the input")
    given = {name: getattr(arguments, name) for name in SCHEDULE}
    repeats = 1 if arguments.repeats is None else arguments.repeats
    import_export()
    opened = artifact.read(Path(arguments.source) if arguments.source else artifact.BUNDLED)
    return opened, EditOptions(**given, repeats=repeats).resolved(opened.defaults), forms[0]


def show(
    arguments: argparse.Namespace, opened: "Artifact", options: "EditOptions", written: str, metadata: dict[str, Any]
) -> None:
    say(f"the edit of {opened.name}: t0 {options.t0:g}, {options.steps} steps, {options.sampler}")
    if arguments.json:
        print_json({"output": written, "sdedit_loop": metadata})
    else:
        print(written)
