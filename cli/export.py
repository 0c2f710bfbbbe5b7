"""`sdedit export`: a checkpoint, a PyTorch network or an ONNX file becomes a verified artifact."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli import export_loop
from sdedit.cli.arguments import add_json, condition, positive
from sdedit.cli.exits import OK, OUT_OF_TOLERANCE
from sdedit.cli.report import show_report
from sdedit.cli.terminal import ProgressBar, print_json, say
from sdedit.errors import BackendUnavailable, OptionError

if TYPE_CHECKING:
    from sdedit.export.exporting import Graph
    from sdedit.export.source import SourceOptions

HELP = "turn a checkpoint, a PyTorch network or an ONNX file into a verified artifact, or that into a whole edit"
TOLD = ("preset", "config", "preconditioning", "class_label")  # of a checkpoint whose family is known
SAID = ("sde", "predicts", "time", "time_scale", "round_time", "unit_data", "sigma_data")  # of any other network
OF_MODULE, OF_ONNX = ("module", "checkpoint", "multiple", "channels"), ("inputs", "output_name", "constant")
OF_EVERY = ("precision", "opset", "dynamic", "name", "license", "allow_inaccurate", "size", "weights")
FAMILIES = ("auto", "diffusers", "ddpm", "score-sde", "guided-diffusion", "edm", "onnx", "artifact", "module")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="a checkpoint file, a diffusers folder or hub id, one of our artifacts, or somebody's .onnx",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="MODEL.onnx", help="the artifact to write")
    parser.add_argument("--family", default="auto", metavar="F", help=f"{', '.join(FAMILIES)} (default: by content)")
    parser.add_argument("--precision", metavar="P", help="fp32 (default), fp16, bf16 or int8; float32 in and out")
    parser.add_argument("--opset", type=int, metavar="N", help="18 (default) to 22 (default of bf16)")
    parser.add_argument("--dynamic", action="store_true", help="any height and width, where the network allows")
    parser.add_argument("--name", help="the model's name in its metadata")
    parser.add_argument("--license", help="the weights' licence, kept in the metadata")
    parser.add_argument(
        "--guide", action="append", metavar="PICTURE",
        help="picture to verify and calibrate with (default: bundled); for a whole edit: uint8 (default) or float32",
    )  # fmt: skip
    parser.add_argument("--allow-inaccurate", action="store_true", help="write it also when verification fails, marked")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(parser)

    told = parser.add_argument_group("what a checkpoint does not say of itself")
    told.add_argument("--preset", metavar="NAME", help="a published model; 'list' shows them all")
    told.add_argument(
        "--config", action="append", metavar="C", help="the original's own options: a JSON or YAML file, or NAME=VALUE"
    )
    told.add_argument("--size", type=positive, metavar="S", help="image height and width")
    told.add_argument("--weights", choices=("ema", "model"), help="which of the file's weights (default: ema)")
    told.add_argument("--preconditioning", choices=("edm", "vp", "ve"), help="of EDM networks")
    told.add_argument("--class-label", type=int, metavar="N", help="fold this class in (default: keep it as an input)")

    any_net = parser.add_argument_group("any other network: --module, or somebody's .onnx")
    any_net.add_argument(
        "--module", metavar="PACKAGE.MODULE:FACTORY", help="callable that returns a torch.nn.Module; its code runs"
    )
    any_net.add_argument("--checkpoint", metavar="FILE", help="its weights (SOURCE does as well)")
    any_net.add_argument("--sde", metavar="KIND[:name=value,…]", help="ve, vp, edm, linear, scaled-linear or cosine")
    any_net.add_argument("--predicts", help="eps (default), score, x0, v, edm or denoiser")
    any_net.add_argument("--time", help="index, continuous, sigma or log-sigma (default: the schedule's usual)")
    any_net.add_argument(
        "--time-scale", type=float, metavar="K", help="the label is multiplied by K (default 1; 0.25 for edm)"
    )
    any_net.add_argument("--round-time", action="store_true", help="round the label, for networks with a table of them")
    any_net.add_argument("--unit-data", action="store_true", help="trained on images in [0, 1] (VE networks)")
    any_net.add_argument("--sigma-data", type=float, metavar="S", help="with --predicts edm (default 0.5)")
    any_net.add_argument("--multiple", type=positive, metavar="M", help="with --dynamic: it takes multiples of M")
    any_net.add_argument("--channels", type=positive, metavar="C", help="image channels of --module (default 3)")
    any_net.add_argument("--inputs", metavar="IMAGE,TIME", help="names of the .onnx's noisy image and time label")
    any_net.add_argument("--output-name", metavar="NAME", help="name of the .onnx's output, where it has several")
    any_net.add_argument(
        "--constant", type=condition, action="append", metavar="NAME=VALUE", help="fold a further input of the .onnx in"
    )
    export_loop.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    import tempfile

    from sdedit import output

    if arguments.preset == "list":
        return list_presets()
    others = (*OF_EVERY, *TOLD, *SAID, *OF_MODULE, *OF_ONNX)
    if arguments.triton is not None:
        return export_loop.run_triton(arguments, others)
    if arguments.output is None:
        raise OptionError("no file to write", hint="-o MODEL.onnx")
    target = Path(arguments.output)
    if target.suffix != ".onnx":
        raise OptionError(f"{target}: an artifact's name ends in .onnx", hint="-o MODEL.onnx")
    if arguments.loop:
        return export_loop.run(arguments, others)
    export_loop.require_unused(arguments)
    for name, needed, given in (
        ("multiple", "--dynamic", arguments.dynamic), ("sigma_data", "--predicts edm", arguments.predicts == "edm"),
    ):  # fmt: skip
        if getattr(arguments, name) is not None and not given:
            raise OptionError(f"--{name.replace('_', '-')} without {needed}", hint=f"add {needed}, or leave it out")
    output.check(
        [target], force=arguments.force, inputs=[Path(p) for p in (arguments.source, arguments.checkpoint) if p]
    )
    exporting = import_export()
    bar = ProgressBar("evaluations")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            graph = open_graph(arguments, Path(scratch))
            for name in ("name", "license"):
                if getattr(arguments, name):
                    graph.metadata[name] = getattr(arguments, name)
            report = exporting.write(
                graph, target, precision=arguments.precision or "fp32", opset=arguments.opset,
                guides=[Path(guide) for guide in arguments.guide or ()],
                allow_inaccurate=arguments.allow_inaccurate, force=arguments.force, say=say, on_evaluation=bar.update,
            )  # fmt: skip
    finally:
        bar.close()
    written = report.within or arguments.allow_inaccurate
    if arguments.json:
        print_json(
            {"output": str(target) if written else None, "metadata": graph.metadata, "verification": report.as_json()}
        )
    else:
        show_report(report, f"against {graph.against}")
        if written:
            print(target)
    if not report.within:
        if not written:
            raise exporting.out_of_tolerance(report, target)
        say(f"{target}: out of tolerance, written because of --allow-inaccurate and marked so in its metadata")
        return OUT_OF_TOLERANCE
    return OK


def import_export() -> Any:
    """The exporter, or the error that says what to install."""
    try:
        from sdedit.export import exporting
    except ImportError as error:
        raise BackendUnavailable(
            f"export: {error.name} cannot be imported", hint="pip install 'sdedit-engine[export]'"
        ) from error
    return exporting


def open_graph(arguments: argparse.Namespace, scratch: Path) -> "Graph":
    """What to export, as a float32 graph with its original beside it; says what was recognised."""
    from sdedit.export import exporting, families

    family = None if arguments.family == "auto" else arguments.family
    if family not in (None, *FAMILIES):
        raise OptionError(f"unknown family {family!r}", hint=f"choose one of {', '.join(FAMILIES)}")
    if arguments.module or family == "module":
        require_none(arguments, TOLD + OF_ONNX, "--module")
        source = module_source(arguments)
    elif arguments.source is None:
        raise OptionError("nothing to export", hint="sdedit export CHECKPOINT -o MODEL.onnx")
    elif arguments.source.endswith(".onnx") or family in ("onnx", "artifact"):
        return open_onnx(arguments, family, scratch)
    else:
        require_none(arguments, SAID + OF_MODULE + OF_ONNX, "a checkpoint, whose family knows")
        source = families.load(arguments.source, source_options(arguments, family))
    say(f"recognised: {source.family}: {source.summary}")
    return exporting.from_source(
        source,
        opset=arguments.opset,
        dynamic=arguments.dynamic,
        name=arguments.name or source.name or Path(arguments.output).stem,
    )


def require_none(arguments: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Raise OptionError for a flag that would be ignored."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise OptionError(f"--{name.replace('_', '-')} is not for {what}", hint="leave it out")


def source_options(arguments: argparse.Namespace, family: str | None) -> "SourceOptions":
    from sdedit.export.source import SourceOptions

    return SourceOptions(
        family, arguments.preset, read_config(arguments.config), arguments.size, arguments.weights,
        arguments.preconditioning, arguments.class_label,
    )  # fmt: skip


def read_config(given: list[str] | None) -> dict[str, Any]:
    """Every --config as one object, later ones winning. Raises OptionError."""
    config: dict[str, Any] = {}
    for one in given or ():
        config |= read_one_config(one)
    return config


def read_one_config(given: str) -> dict[str, Any]:
    """A JSON or YAML file, an inline JSON object, or NAME=VALUE."""
    hint = "--config options.yaml, --config options.json or --config image_size=256"
    name, separator, value = given.partition("=")
    inline = given.lstrip().startswith("{")
    if separator and not inline:
        try:
            return {name: json.loads(value)}
        except ValueError:
            return {name: value}
    try:
        text = given if inline else Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--config {given}: cannot be read: {reason}", hint=hint) from error
    try:
        if given.endswith((".yml", ".yaml")):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except Exception as error:  # each parser has its own
        raise OptionError(f"--config {given}: {' '.join(str(error).split())}", hint=hint) from error
    if not isinstance(found, dict):
        raise OptionError(f"--config {given}: holds no options", hint=hint)
    return found


def open_onnx(arguments: argparse.Namespace, family: str | None, scratch: Path) -> "Graph":
    from sdedit import artifact
    from sdedit.export import exporting, foreign

    path = Path(arguments.source)
    ours = family == "artifact" or (family is None and artifact.is_artifact(path))
    fixed = ("dynamic", "weights")
    if ours:
        require_none(arguments, (*TOLD, *SAID, *OF_MODULE, *OF_ONNX, *fixed, "size"), "one of our artifacts")
        graph = exporting.from_artifact(path, scratch)
        say(f"recognised: one of our artifacts: {graph.metadata.get('name', path.stem)}")
        return graph
    if arguments.sde is None:
        raise OptionError(
            f"{path}: an ONNX file without our metadata; its conventions must be said",
            hint="--sde KIND --predicts P --time T --inputs IMAGE,TIME; the README's section 'Export' explains them",
        )
    require_none(arguments, (*TOLD, *OF_MODULE, *fixed), "an ONNX file")
    interface = foreign.Interface(
        arguments.inputs.split(",") if arguments.inputs else None, arguments.output_name, dict(arguments.constant or ())
    )
    size = None if arguments.size is None else (arguments.size, arguments.size)
    say("recognised: an ONNX graph of somebody else's, wrapped as said")
    return foreign.wrap(path, interface, convention(arguments), size, arguments.name or Path(arguments.output).stem)


def convention(arguments: argparse.Namespace) -> Any:
    from sdedit.export import schedules
    from sdedit.export.denoiser import Convention, usual_label

    schedule = schedules.parse(arguments.sde)
    predicts = arguments.predicts or "eps"
    usual_time, usual_scale = usual_label(schedule, predicts)
    scale = usual_scale if arguments.time_scale is None else arguments.time_scale
    data_range = (0.0, 1.0) if arguments.unit_data else (-1.0, 1.0)
    return Convention(
        schedule, predicts, arguments.time or usual_time, scale, arguments.round_time, data_range,
        0.5 if arguments.sigma_data is None else arguments.sigma_data,
    )  # fmt: skip


def module_source(arguments: argparse.Namespace) -> Any:
    from sdedit.export import module

    if arguments.sde is None or arguments.size is None or arguments.module is None:
        missing = next(flag for flag in ("module", "sde", "size") if getattr(arguments, flag) is None)
        raise OptionError(
            f"--{missing} is missing: any other network needs --module, --sde and --size",
            hint="--module package.module:factory --sde linear --size 64 --predicts eps --time index",
        )
    if arguments.source and arguments.checkpoint:
        raise OptionError(f"weights twice: {arguments.source} and --checkpoint", hint="name one file of them")
    return module.load(
        arguments.module, arguments.checkpoint or arguments.source, convention(arguments),
        channels=arguments.channels or 3, size=arguments.size, multiple=arguments.multiple or 1,
        weights=arguments.weights,
    )  # fmt: skip


def list_presets() -> int:
    import_export()
    from sdedit.export import families

    for name, family in families.families().items():
        if family.PRESETS:
            print(f"{name}: {', '.join(family.PRESETS)}")
    return OK
