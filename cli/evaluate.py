"""`sdedit evaluate`: folders of results in, how real and how faithful they are out; and the same asked of people."""

import argparse
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sdedit.cli.arguments import add_json, convention, named
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.evaluation import Inputs
    from sdedit.features import DistanceNetwork, FeatureNetwork

HELP = "measure folders of results: KID, L2, LPIPS, what changed outside masks; or ask people"
SUFFIXES = (".html", ".md", ".csv", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guides", type=named, metavar="DIR", help="the guides; all other pictures are paired with them by name"
    )
    parser.add_argument(
        "--methods", type=named, nargs="+", default=[], metavar="DIR", help="results of each method, one folder each"
    )
    parser.add_argument("--real", type=named, metavar="DIR", help="real pictures, for KID")
    parser.add_argument("--masks", type=named, metavar="DIR", help="masks of the guides' names: white was repainted")
    parser.add_argument(
        "--features", metavar="FILE", help="feature network for KID: TorchScript or ONNX, (N, 3, H, W) to (N, F)"
    )
    parser.add_argument(
        "--feature-input",
        type=convention,
        metavar="SIZE:LOW:HIGH",
        help="what it is fed: pixels a side (or own), and what 0 and 255 become "
        "(default 299:-1:0.9921875, as FID's Inception)",
    )
    parser.add_argument(
        "--lpips", metavar="FILE", help="LPIPS network: TorchScript or ONNX, two (N, 3, H, W) in [-1, 1] to (N,)"
    )
    parser.add_argument("--subset-size", type=int, metavar="N", help="pictures of each side in a subset (default 100)")
    parser.add_argument("--subsets", type=int, metavar="N", help="subsets that KID is the mean of (default 100)")
    parser.add_argument(
        "--pairs",
        type=named,
        nargs=2,
        metavar=("A", "B"),
        help="write a page that shows results of A and B side by side, unnamed, and asks which is more real; "
        "with --guides also which follows the guide better",
    )
    parser.add_argument("--count", type=int, metavar="N", help="of how many guides a page shows pairs (default 50)")
    parser.add_argument("--answers", nargs="+", metavar="FILE.json", help="read answers that were saved from a page")
    parser.add_argument("--seed", type=int, help="of KID's subsets, or of the pairs and their sides (default 0)")
    parser.add_argument("-o", "--output", metavar="REPORT", help="write .html (with pictures), .md, .csv or .json")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sdedit.cli import evaluate_pairs

    if arguments.answers is not None:
        return evaluate_pairs.read_answers(arguments)
    if arguments.pairs is not None:
        return evaluate_pairs.write_page(arguments)
    return measure(arguments)


def measure(arguments: argparse.Namespace) -> int:
    """Raises OptionError for what is missing before any picture is read."""
    import json

    from sdedit import metrics
    from sdedit.cli import evaluation_report
    from sdedit.cli.networks import open_features, open_lpips
    from sdedit.evaluation import evaluate, open_inputs

    if arguments.guides is None:
        raise OptionError("no --guides", hint="sdedit evaluate --guides DIR --methods DIR … (or --pairs, --answers)")
    if arguments.features is not None and arguments.real is None:
        raise OptionError("--features without --real", hint="KID compares with real pictures: name their folder")
    of_kid = ("feature_input", "subset_size", "subsets", "seed")
    if arguments.features is None and (given := [name for name in of_kid if getattr(arguments, name) is not None]):
        raise OptionError(
            f"--{given[0].replace('_', '-')} without --features", hint="name the feature network too: it is for KID"
        )
    if arguments.count is not None:
        raise OptionError("--count without --pairs", hint="all pictures are measured")
    target = checked_output(arguments, SUFFIXES)
    inputs = open_inputs(arguments.guides, arguments.methods, real=arguments.real, masks=arguments.masks)
    features = None if arguments.features is None else open_features(arguments.features, arguments.feature_input)
    lpips = None if arguments.lpips is None else open_lpips(arguments.lpips)
    if features is None:
        say(f"without --features there is no KID: {'L2 and LPIPS' if lpips else 'L2'} only")
    usual = {"subset_size": metrics.SUBSET_SIZE, "subsets": metrics.SUBSETS, "seed": 0}
    asked = {name: value for name in usual if (value := getattr(arguments, name)) is not None}
    bar = ProgressBar("pictures")
    try:
        rows = evaluate(inputs, features=features, lpips=lpips, on_pictures=bar.update, **usual | asked)
    finally:
        bar.close()
    report = evaluation_report.as_report(conditions(inputs, features, lpips, usual | asked), rows)
    if target is not None:
        match target.suffix:
            case ".html":
                text = evaluation_report.as_html(report, inputs)
            case ".md":
                text = evaluation_report.as_markdown(report)
            case ".csv":
                text = evaluation_report.as_csv(report)
            case _:
                text = json.dumps(report, indent=2) + "\n"
        write_text(target, text, force=arguments.force)
    if arguments.json:
        print_json(report)
    else:
        print(evaluation_report.as_markdown(report), end="")
    return OK


def conditions(
    inputs: "Inputs",
    features: "FeatureNetwork | None",
    lpips: "DistanceNetwork | None",
    chosen: dict[str, int],
) -> dict[str, Any]:
    """What the numbers depend on."""
    import sdedit

    return {
        "guides": len(inputs.guides),
        "real": None if inputs.real is None else len(inputs.real),
        "masks": inputs.masks is not None,
        "size": list(inputs.size),
        "guide_size": list(inputs.guides.size),
        "features": features
        and {"name": features.name, "sha256": features.sha256, "input": str(features.convention), **chosen},
        "lpips": lpips and {"name": lpips.name, "sha256": lpips.sha256},
        "sdedit-engine": sdedit.__version__,
    }


def checked_output(arguments: argparse.Namespace, suffixes: tuple[str, ...]) -> Path | None:
    """Where the report goes. Raises OptionError, OutputError."""
    from sdedit import output

    if arguments.output is None:
        return None
    target = Path(arguments.output)
    if target.suffix not in suffixes:
        raise OptionError(f"{target}: wanted a name in {', '.join(suffixes)}", hint=f"-o report{suffixes[0]}")
    inputs = [arguments.features, arguments.lpips, *(arguments.answers or ())]
    output.check([target], force=arguments.force, inputs=[Path(path) for path in inputs if path is not None])
    return target


def write_text(target: Path, text: str, *, force: bool) -> None:
    from sdedit import output

    def write(file: IO[bytes]) -> None:
        file.write(text.encode(errors="backslashreplace"))  # of names that are not Unicode, as on a terminal

    output.write_all([(target, write)], force=force)
