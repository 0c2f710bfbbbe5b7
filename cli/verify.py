"""`sdedit verify`: do two artifacts, or two backends, compute the same function?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdedit.cli.arguments import add_json, condition
from sdedit.cli.exits import OK, OUT_OF_TOLERANCE
from sdedit.cli.report import show_report
from sdedit.cli.terminal import ProgressBar, print_json
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.editor import Editor

HELP = "compare two artifacts, or one artifact on two backends, at every noise level and along an edit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", help="the artifact to check")
    parser.add_argument(
        "--against", required=True, metavar="OTHER", help="the artifact that is right; or a backend's name, for MODEL"
    )
    parser.add_argument("--backend", default="auto", help="what runs MODEL (default: auto)")
    parser.add_argument("--precision", metavar="P", help="what MODEL is executed in (default: its own)")
    parser.add_argument("--tolerance", type=float, metavar="E", help="largest error allowed (default: the precision's)")
    parser.add_argument("--guide", action="append", metavar="PICTURE", help="picture to edit (default: bundled ones)")
    parser.add_argument(
        "--set", type=condition, action="append", metavar="NAME=VALUE", help="a further input, such as class_label=3"
    )
    parser.add_argument("--threads", type=int, metavar="T", help="CPU threads of the networks")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import sdedit
    from sdedit import verify
    from sdedit.backends import BACKENDS

    same_file = arguments.against in BACKENDS
    candidate = sdedit.load(
        arguments.model, backend=arguments.backend, precision=arguments.precision, threads=arguments.threads
    )
    reference = sdedit.load(
        arguments.model if same_file else arguments.against,
        backend=arguments.against if same_file else "auto",
        threads=arguments.threads,
    )
    require_comparable(candidate, reference)
    if arguments.tolerance is not None and not arguments.tolerance >= 0:
        raise OptionError(f"tolerance is {arguments.tolerance}; wanted a number from 0", hint="--tolerance 1e-5")
    precisions = {candidate.backend.precision, reference.backend.precision}
    tolerance = max(verify.TOLERANCES.get(p, 0.0) for p in precisions)
    size = candidate.artifact.metadata["image"]
    guides = verify.guide_frames([Path(g) for g in arguments.guide or ()], size)[:2]
    conditions = dict(arguments.set or ())
    bar = ProgressBar("evaluations")
    try:
        report = verify.compare(
            lambda batch: reference.backend.bind(batch, conditions),
            lambda batch: candidate.backend.bind(batch, conditions), candidate.sde, guides,
            tolerance=tolerance if arguments.tolerance is None else arguments.tolerance,
            with_images=precisions != {"fp32"}, on_evaluation=bar.update,
        )  # fmt: skip
    finally:
        bar.close()
    sides = {
        side: {"name": e.artifact.name, "backend": e.backend.name, "precision": e.backend.precision}
        for side, e in (("model", candidate), ("against", reference))
    }
    if arguments.json:
        print_json({**sides, **report.as_json()})
    else:
        described = (f"{s['name']} ({s['precision']}, {s['backend']})" for s in sides.values())
        show_report(report, "of {} against {}".format(*described))
    return OK if report.within else OUT_OF_TOLERANCE


def require_comparable(candidate: "Editor", reference: "Editor") -> None:
    """Raise OptionError unless the two are meant to be the same function."""
    for what in ("channels", "height", "width"):
        ours, theirs = getattr(candidate.artifact, what), getattr(reference.artifact, what)
        if ours != theirs:
            raise OptionError(
                f"{what} is {ours} in {candidate.artifact.name} and {theirs} in {reference.artifact.name}",
                hint="compare exports of one checkpoint",
            )
    if candidate.sde != reference.sde:
        raise OptionError(
            f"{candidate.artifact.name} and {reference.artifact.name} have different noise schedules",
            hint="compare exports of one checkpoint",
        )
