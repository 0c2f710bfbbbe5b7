"""`sdedit batch`: a folder of guides in, a folder of pictures out."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import add_json, add_model, add_running, add_schedule, named
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, print_json, say
from sdedit.errors import ImageError, OptionError

if TYPE_CHECKING:
    from sdedit.ledger import FolderProgress, FolderResult

HELP = "edit every picture of a folder; started again, finish what is left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "guides", type=named, metavar="IN", help="folder of guides, with all its folders: PNG, JPEG, WebP, TIFF and BMP"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=named,
        required=True,
        metavar="OUT",
        help="folder for the results, PNGs of the guides' names",
    )
    parser.add_argument(
        "--masks", type=named, metavar="DIR", help="folder of masks of the guides' names: white repaints"
    )
    add_model(parser)
    add_schedule(parser)
    parser.add_argument("--seed", type=int, help="with a file's path below IN it makes the file's seed (default 0)")
    add_running(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="pictures in a network call (default 8; a plan's own)")
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="threads that read and write pictures (default: one a core, at most 4); with --ray, actors that hold a "
        "model (default: as many as fit)",
    )  # fmt: skip
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="run on a Ray cluster: auto is the one this machine belongs to, or else a new one here (as local); IN, "
        "OUT and DIR are paths that mean the same on its machines, or URLs that fsspec opens there, such as "
        "s3://bucket/in; --threads of each actor default to 1",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="start over, and replace existing output files")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    bar = ProgressBar("pictures")

    def on_file(progress: "FolderProgress") -> None:
        if progress.error is not None:
            bar.close()
            say(_about(progress.path, progress.error))
        bar.update(progress.done, progress.total)

    places = {
        "guides": arguments.guides, "output_folder": arguments.output, "masks": arguments.masks,
        "workers": arguments.workers, "force": arguments.force, "on_file": on_file,
    }  # fmt: skip
    try:
        result = run_here(arguments, places) if arguments.ray is None else run_on_ray(arguments, places)
    finally:
        bar.close()
    if arguments.json:
        print_json(report(result))
    else:
        print(f"{result.edited} edited, {result.kept} done before, {len(result.failed)} failed: {result.manifest}")
    if result.failed:
        failed, total = len(result.failed), result.edited + result.kept + len(result.failed)
        raise ImageError(
            f"{failed} of {total} pictures could not be edited", hint="mend them and run the same command again"
        )
    return OK


def run_here(arguments: argparse.Namespace, places: dict[str, Any]) -> "FolderResult":
    from sdedit.cli.edit import open_fresh
    from sdedit.folder import edit_folder

    editor, options = open_fresh(arguments)
    with editor:
        return edit_folder(editor, **places, **options)


def run_on_ray(arguments: argparse.Namespace, places: dict[str, Any]) -> "FolderResult":
    from sdedit.cli.edit import given_options
    from sdedit.ray_folder import edit_folder_on_ray

    if arguments.fast:
        raise OptionError("--fast is for one machine", hint="name --backend and --precision, and all workers agree")
    return edit_folder_on_ray(
        arguments.model, address=arguments.ray, backend=arguments.backend or "auto", precision=arguments.precision,
        threads=arguments.threads, provider_options=dict(arguments.ep_option or ()), **places,
        **given_options(arguments),
    )  # fmt: skip


def report(result: "FolderResult") -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "options": asdict(result.options),
        "manifest": str(result.manifest),
        "edited": result.edited,
        "kept": result.kept,
        "failed": {path: str(error) for path, error in result.failed.items()},
        "total_ms": result.total_ms,
    }


def _about(path: str | None, error: Exception) -> str:
    """The error, with the file's name where it does not say it."""
    message = " ".join(str(error).split())
    return message if path is not None and path in message else f"{path}: {message}"
