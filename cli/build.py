"""`sdedit build`: an artifact in, a TensorRT plan and its sidecar out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import add_json, positive
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, print_json
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.tensorrt.build import Built

HELP = "build a TensorRT plan of an artifact, for the GPU here or ahead of time for others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", help="the artifact to build from")
    parser.add_argument(
        "-o", "--output", metavar="MODEL.plan",
        help="the plan to write; MODEL.plan.json, which says what it is, goes beside it (default: beside the artifact)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", metavar="B", help="tensorrt or tensorrt-rtx (default: the first of them that is installed)"
    )
    parser.add_argument(
        "--target", default="current", metavar="T,…",
        help="current (default), the GPU here; tensorrt-rtx also builds without one: sm_86,sm_89",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=batch, default=(1, 1, 1), metavar="MIN:OPT:MAX",
        help="batch sizes that it runs, and the one it is tuned for; one number pins it (default: 1, the fastest)",
    )  # fmt: skip
    parser.add_argument("--workspace", type=positive, metavar="MB", help="most scratch memory that a kernel may use")
    parser.add_argument(
        "--timing-cache", metavar="F", help="file of kernel timings to read and extend (tensorrt only): faster rebuilds"
    )
    parser.add_argument("--explain", action="store_true", help="also show which kernels it has, what was fused, memory")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    add_json(parser)


def batch(text: str) -> tuple[int, int, int]:
    """MIN:OPT:MAX, or one number for all three. Their order is checked by the engine."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:OPT:MAX")
    least, tuned, most = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    return least, tuned, most


def run(arguments: argparse.Namespace) -> int:
    from sdedit import artifact, output
    from sdedit.tensorrt import build, installed, plan

    model = Path(arguments.model)
    target = Path(arguments.output) if arguments.output else model.with_suffix(".plan")
    if target.suffix != ".plan":
        raise OptionError(f"{target}: a plan's name ends in .plan", hint="-o MODEL.plan")
    opened = artifact.read(model)
    output.check([target, plan.sidecar_path(target)], force=arguments.force, inputs=[model])
    found = installed.open_library(arguments.backend) if arguments.backend else installed.first_installed()
    bar = ProgressBar("%")
    try:
        built = build.build(
            opened, found, targets=arguments.target.split(","), batch=arguments.batch,
            workspace_bytes=None if arguments.workspace is None else arguments.workspace * 10**6,
            timing_cache=Path(arguments.timing_cache) if arguments.timing_cache else None,
            on_progress=lambda done, total, phase: bar.update(done, total), verbose=arguments.explain,
        )  # fmt: skip
    finally:
        bar.close()
    plan.write(target, built.data, built.sidecar, force=arguments.force)
    if arguments.json:
        explained = {"kernels": explain(built)} if arguments.explain else {}
        print_json({"output": str(target), "sidecar": built.sidecar, **explained})
        return OK
    if arguments.explain:
        show(built)
    print(target)
    return OK


def explain(built: "Built") -> dict[str, Any]:
    """The kernels as JSON: how many, of which kinds, computing what."""
    return {"total": len(built.kernels), "kinds": built.kinds, "operators": built.labels}


def show(built: "Built") -> None:
    sidecar = built.sidecar
    made = f"{sidecar['library']['name']} {sidecar['library']['version']}, {sidecar['precision']}"
    cost = f"{len(built.data) / 1e6:.1f} MB, built in {sidecar['build_seconds']:.1f} s"
    print(f"{made}, for {', '.join(sidecar['targets'])}: {cost}")
    if built.kernels:
        kinds = ", ".join(f"{count} {kind}" for kind, count in built.kinds.items())
        print(f"{len(built.kernels)} kernels: {kinds}")
        for label, count in built.labels.items():
            print(f"{count:>6}  {label}")
    else:
        print("kernels: TensorRT listed none")
    sizes = ":".join(map(str, sidecar["profile"]["batch"]))
    for size in built.activation_bytes or ():
        print(f"activation memory: {size / 1e6:.1f} MB for batches {sizes}")
