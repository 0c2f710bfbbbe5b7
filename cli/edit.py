"""`sdedit edit`: guides in, pictures out."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import SCHEDULE, add_json, add_model, add_running, add_schedule
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.editor import Editor
    from sdedit.image import Encoded
    from sdedit.record import Record
    from sdedit.results import EditResult, Progress

HELP = "edit pictures: noise each guide up to t0, denoise it back"
RECORDED = (*SCHEDULE, "seed", "samples", "repeats", "size", "fit", "region", "set")  # a replay has its own
PINNED = ("backend", "precision", "fast", "threads", "ep_option")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "guides", nargs="+", metavar="GUIDE", help="a stroke painting, a photograph with strokes, a collage"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="OUT.png (several results: OUT-000.png …) or OUT.npy (all results as one float32 array at model size, "
        "before any pasting)",
    )  # fmt: skip
    add_model(parser)
    add_schedule(parser)
    parser.add_argument("--seed", type=int, help="seed of the first result; result j has seed + j (default 0)")
    parser.add_argument("-n", "--samples", type=int, metavar="N", help="results per guide (default 1)")
    parser.add_argument(
        "--mask",
        action="append",
        metavar="M",
        help="picture of the guide's size: white repaints, black keeps; once for all guides, or once for each",
    )
    add_running(parser)
    parser.add_argument(
        "--region",
        metavar="R",
        help="with a mask: full (default) runs the network on the whole frame, auto on windows around what is "
        "repainted where the model takes other sizes and that is cheaper",
    )
    parser.add_argument(
        "--max-ms",
        type=float,
        metavar="B",
        help="as many steps, at most --steps, as are done B milliseconds after the start of the process, file written",
    )
    parser.add_argument(
        "--replay",
        metavar="OUT.png",
        help="repeat the edit that made OUT.png, with its options, from the same guide and mask",
    )
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from sdedit import image, output
    from sdedit.budget import checked_max_ms
    from sdedit.cli import budget
    from sdedit.options import EditOptions

    target = Path(arguments.output)
    asked = EditOptions() if arguments.samples is None else EditOptions(samples=arguments.samples)
    paths = output_paths(target, len(arguments.guides) * asked.resolved({}).samples)
    given = (*arguments.guides, *(arguments.mask or ()), arguments.replay, arguments.model)
    inputs = [Path(path) for path in given if path is not None]
    output.check(paths, force=arguments.force, inputs=inputs)

    if arguments.max_ms is not None:
        checked_max_ms(arguments.max_ms)
    repeated = None if arguments.replay is None else read_record(arguments)
    guides = [image.read_file(path) for path in arguments.guides]  # once: a pipe's bytes are gone then
    masks = [image.read_file(path) for path in arguments.mask or ()]
    if arguments.fast:  # before a search that may take a while
        for guide in guides:
            image.read(guide, 3)
    began = time.perf_counter()
    editor, options = open_fresh(arguments) if repeated is None else open_replay(arguments, repeated, guides, masks)
    load_ms = 1e3 * (time.perf_counter() - began)
    if masks:
        options["mask"] = masks
    if arguments.max_ms is not None:
        spent_ms = budget.spent_ms(editor, arguments.size, guides, masks, len(paths))
        options |= {"max_ms": arguments.max_ms, "spent_ms": spent_ms}
    result = edit_with_progress(editor, guides, options)
    if result.budget is not None:
        say(budget.told(result.budget))
    for note in notes(result):
        say(note)
    if repeated is not None:
        result = replace(result, budget=repeated.budget)  # so that the record, too, is the same
    write(editor, result, paths, force=arguments.force)
    if arguments.json:
        print_json(report(editor, result, paths, load_ms))
    else:
        print(*paths, sep="\n")
    return OK


def output_paths(
    target: Path, count: int, suffixes: tuple[str, ...] = (".png", ".npy"), *, flag: str = "-o"
) -> list[Path]:
    """The files that `count` results go to. Raises OptionError."""
    if target.suffix not in suffixes:
        better = target.with_suffix(".png") if target.name else "OUT.png"
        raise OptionError(f"{target}: outputs are {' or '.join(suffixes)}", hint=f"{flag} {better}")
    if target.suffix == ".npy" or count <= 1:
        return [target]
    return [target.with_name(f"{target.stem}-{j:03d}.png") for j in range(count)]


def open_fresh(arguments: argparse.Namespace) -> tuple["Editor", dict[str, Any]]:
    """The editor and the edit's options, from the command line."""
    import sdedit
    from sdedit.artifact import Artifact
    from sdedit.backends import CPU
    from sdedit.editor import open_model
    from sdedit.options import make_options

    options = given_options(arguments)
    if arguments.fast and isinstance(model := open_model(arguments.model), Artifact):
        make_options(options).resolved(model.defaults)  # before a search that may take a while
    editor = sdedit.load(
        arguments.model,
        backend="auto" if arguments.backend is None else arguments.backend,
        precision=arguments.precision,
        fast=bool(arguments.fast),
        threads=arguments.threads,
        provider_options=dict(arguments.ep_option or ()),
    )
    if arguments.backend in (None, "auto") and not arguments.fast:  # which says what it took
        backend = editor.backend
        where = f"{backend.threads} threads" if backend.name in CPU else backend.provider
        say(f"backend: {backend.name}, {backend.precision}, {where}")
    return editor, options


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The edit's options that the command line gives."""
    from dataclasses import fields

    from sdedit.options import EditOptions

    options = {f.name: v for f in fields(EditOptions) if (v := getattr(arguments, f.name, None)) is not None}
    return options | {"conditions": dict(arguments.set or ())}


def read_record(arguments: argparse.Namespace) -> "Record":
    """The record that --replay names. Raises ReplayError, and OptionError for flags that would change it."""
    from sdedit import record

    repeated = record.read(Path(arguments.replay))
    if changed := [name for name in (*RECORDED, "max_ms", *PINNED) if getattr(arguments, name) is not None]:
        flag = f"--{changed[0].replace('_', '-')}"
        raise OptionError(f"--replay takes its options from the record, not from {flag}", hint=f"leave {flag} out")
    if len(arguments.guides) != 1 or Path(arguments.output).suffix != ".png":
        raise OptionError("--replay makes one PNG from one guide", hint="sdedit edit --replay OUT.png GUIDE -o NEW.png")
    return repeated


def open_replay(
    arguments: argparse.Namespace, repeated: "Record", guides: "list[Encoded]", masks: "list[Encoded]"
) -> tuple["Editor", dict[str, Any]]:
    """The editor and the options that the record names, whose pictures these must be."""
    from dataclasses import asdict

    import sdedit
    from sdedit import artifact, companions, record

    record.require_same("guide", repeated.guide_sha256, guides[0].sha256)
    record.require_same("mask", repeated.mask_sha256, masks[0].sha256 if masks else None)
    model = artifact.BUNDLED if arguments.model is None else Path(arguments.model)
    if model.suffix == ".onnx":
        model = companions.with_sha256(model, repeated.artifact_sha256)  # --fast may have taken one
        record.require_same("model", repeated.artifact_sha256, artifact.read(model).sha256)
    editor = sdedit.load(
        model,
        backend=repeated.backend,
        precision=repeated.precision,
        threads=repeated.threads,
        provider_options=repeated.provider_options,
    )
    here = record.versions(editor)
    for package in sorted(here.keys() | repeated.versions.keys()):
        version, made_with = here.get(package, "none"), repeated.versions.get(package, "none")
        if made_with != version:
            say(f"{package}: {version} here, {made_with} in the record: the bytes may differ")
    record.require_same("model", repeated.artifact_sha256, editor.artifact.sha256)
    return editor, asdict(repeated.options)


def edit_with_progress(editor: "Editor", guides: "list[Encoded]", options: dict[str, Any]) -> "EditResult":
    bar = ProgressBar()

    def on_step(progress: "Progress") -> None:
        bar.update(progress.done, progress.total)

    watch = on_step if bar.shown else None  # a GPU runs on without waiting where nobody watches
    try:
        return editor.edit(guides, on_step=watch, **options)
    finally:
        bar.close()


def write(editor: "Editor", result: "EditResult", paths: list[Path], *, force: bool) -> None:
    """Raises OutputError."""
    from sdedit import output, record

    if paths[0].suffix == ".npy":
        output.write_all([(paths[0], output.npy(result.x))], force=force)
    else:
        pictures = (
            output.png(one.pixels, record.make(editor, result, j), one.guide.profile)
            for j, one in enumerate(result.results)
        )
        output.write_all(list(zip(paths, pictures, strict=True)), force=force)


def notes(result: "EditResult") -> list[str]:
    """What happened to the guides on the way that the user should know."""
    enlarged = (note for one in result.results for note in one.placement.notes(one.guide))
    return list(dict.fromkeys((*result.notes, *enlarged)))


def report(editor: "Editor", result: "EditResult", paths: list[Path], load_ms: float) -> dict[str, Any]:
    """The object that --json prints."""
    from dataclasses import asdict

    from sdedit.capi.shipped import noise_maker

    backend = editor.backend
    return {
        "options": asdict(result.options),
        "backend": {
            "name": backend.name,
            "provider": backend.provider,
            "precision": backend.precision,
            "threads": backend.threads,
            **backend.versions,
        },
        "model": {"name": editor.artifact.name, "sha256": editor.artifact.sha256},
        "noise": noise_maker() if result.timings.device_ms is None else None,  # a GPU makes its own
        "seeds": result.seeds,
        "timings": {"load_ms": load_ms, **asdict(result.timings)},
        **({"budget": asdict(result.budget)} if result.budget else {}),
        "outputs": [str(path) for path in paths],
    }
