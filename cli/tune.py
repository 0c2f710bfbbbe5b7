"""`sdedit tune`: which t0? A sheet to choose from, a search for a number, or a few questions."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import add_json, add_model, add_running, add_steps, condition, convention, named, positive
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.editor import Editor
    from sdedit.output import Writer
    from sdedit.tuning import Found, Trial, Tuner

HELP = "choose t0: a contact sheet over t0 and seeds, a search for a distance, or a few questions at the terminal"
T0S = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SAMPLES = 4
OF_KID = ("real", "features", "feature_input")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "guide", type=named, nargs="?", metavar="GUIDE", help="the guide; --set DIR names a folder of them, for one t0"
    )
    parser.add_argument(
        "-o", "--output", metavar="SHEET", help="the contact sheet, SHEET.png; with --interactive the preview"
    )
    add_model(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--t0", type=t0_list, dest="t0s", metavar="T0,T0…", help="the sheet's columns (default 0.2,0.3,0.4,0.5,0.6,0.7)"
    )
    choice.add_argument(
        "--faithfulness", "--l2", type=at_most("L2"), dest="l2", metavar="L2<=X",
        help="find the largest t0 whose results differ from their guides by at most X: √Σ(differences)² of values in "
        "[0, 1], the mean over guides and seeds",
    )  # fmt: skip
    choice.add_argument(
        "--realism", type=at_most("KID"), dest="kid", metavar="KID<=X",
        help="find the smallest t0 whose results have at most this KID to the pictures in --real, as --features see "
        "them; wants a --set of a hundred guides or more",
    )  # fmt: skip
    choice.add_argument(
        "--interactive", action="store_true", help="look at the preview, and say: more faithful, or more real?"
    )
    parser.add_argument("--real", type=named, metavar="DIR", help="folder of real pictures, for --realism")
    parser.add_argument("--features", metavar="FILE", help="feature network, ONNX or TorchScript, for --realism")
    parser.add_argument(
        "--feature-input", type=convention, metavar="SIZE:LOW:HIGH", help="what it is fed, as for evaluate"
    )
    parser.add_argument("--mask", metavar="M", help="the guide's mask: white repaints, black keeps")
    parser.add_argument("--masks", type=named, metavar="DIR", help="folder of masks of the names in --set")
    add_steps(parser)
    parser.add_argument("--seed", type=int, help="seed of the first result; result j has seed + j (default 0)")
    parser.add_argument(
        "-n", "--samples", type=int, default=SAMPLES, metavar="N", help=f"seeds for each guide (default {SAMPLES})"
    )
    add_running(parser, set_type=folder_or_condition)
    parser.add_argument("--batch", type=positive, metavar="N", help="pictures in a network call (default: up to 8)")
    parser.add_argument("--force", action="store_true", help="replace an existing sheet")
    add_json(parser)


def t0_list(text: str) -> list[float]:
    """NUMBER,NUMBER…"""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from None


def at_most(name: str) -> Any:
    """A type for NAME<=NUMBER, or the number alone."""

    def limit(text: str) -> float:
        found = re.fullmatch(rf"(?:{name}\s*<=)?\s*([0-9.eE+-]+)\s*", text, re.IGNORECASE)
        try:
            return float(found[1] if found else "")
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not '{name}<=NUMBER', or the number alone") from None

    return limit


def folder_or_condition(text: str) -> Path | tuple[str, float]:
    """The folder of a set of guides, or NAME=NUMBER of a model's input."""
    return condition(text) if "=" in text and not Path(text).is_dir() else Path(text)


def run(arguments: argparse.Namespace) -> int:
    from sdedit import output
    from sdedit.cli.edit import open_fresh, output_paths
    from sdedit.tuning import open_tuner

    folders = [one for one in arguments.set or () if isinstance(one, Path)]
    arguments.set = [one for one in arguments.set or () if not isinstance(one, Path)]
    guides, masks = inputs(arguments, folders)
    measure = "l2" if arguments.l2 is not None else "kid" if arguments.kid is not None else None
    if arguments.output is None and measure is None:
        raise OptionError("no -o for the sheet", hint="-o SHEET.png; only --faithfulness and --realism go without")
    if measure == "kid" and None in (arguments.real, arguments.features):
        raise OptionError("--realism compares with real pictures", hint="--real DIR --features FILE.onnx")
    if measure != "kid" and (given := [name for name in OF_KID if getattr(arguments, name) is not None]):
        raise OptionError(
            f"--{given[0].replace('_', '-')} without --realism", hint='--realism "KID<=0.02", say; or leave it out'
        )
    target = None if arguments.output is None else output_paths(Path(arguments.output), 1, (".png",))[0]
    if target is not None:
        real = () if measure != "kid" else pictures_in(Path(arguments.real))
        output.check([target], force=arguments.force, inputs=[*guides, *(masks or ()), *real])
    t0s = list(T0S) if arguments.t0s is None else arguments.t0s
    searched = measure is not None or arguments.interactive

    editor, options = open_fresh(arguments)
    with open_tuner(editor, guides, masks=masks, t0s=1 if searched else len(t0s), **options) as tuner:
        for note in tuner.notes:
            say(note)
        shown = Shown(tuner, guides if folders else None)
        if arguments.interactive and target is not None:
            trials = by_eye(shown, target)
        elif measure is not None:
            found = search(tuner, measure, arguments, editor)
            trials = [found.trial, *(trial for trial in found.trials if trial is not found.trial)]
        else:
            trials = with_bar(tuner, t0s)
        if target is not None and not arguments.interactive:
            output.replace(target, shown.sheet(sorted(trials, key=lambda trial: trial.t0) if searched else trials))
    best = trials[0] if searched else None
    command = again(arguments, tuner, folders, trials, best)
    if arguments.json:
        print_json(report(editor, tuner, trials, best, target, command))
    else:
        if measure is not None:
            print(described(trials[0]))
        if target is not None:
            print(target)
        print(command)
    return OK


def inputs(arguments: argparse.Namespace, folders: list[Path]) -> tuple[list[Path], list[Path] | None]:
    """The guides and, if there are any, their masks. Raises OptionError, ImageError."""
    from sdedit.listing import mask_of, pictures_of

    if (arguments.guide is not None) + len(folders) != 1:
        raise OptionError("wanted one guide, or one folder of guides", hint="sdedit tune GUIDE.png, or --set DIR")
    if arguments.guide is not None:
        if Path(arguments.guide).is_dir() or arguments.masks is not None:
            raise OptionError("a folder of guides goes with --set, its masks with --masks", hint="--set DIR")
        return [Path(arguments.guide)], None if arguments.mask is None else [Path(arguments.mask)]
    if arguments.mask is not None:
        raise OptionError("--mask is for one guide", hint="a set has a folder of masks, --masks DIR")
    names = pictures_of(folders[0])
    masks = None if arguments.masks is None else [mask_of(Path(arguments.masks), name) for name in names]
    return [folders[0] / name for name in names], masks


def pictures_in(folder: Path) -> list[Path]:
    """Raises ImageError."""
    from sdedit.listing import pictures_of

    return [folder / name for name in pictures_of(folder)]


class Shown:
    """Trials as a sheet: a row a seed and the guide beside them, or for a set a row a guide, its seeds in a square."""

    def __init__(self, tuner: "Tuner", guides: list[Path] | None) -> None:
        self.tuner, self._guides = tuner, guides

    def sheet(self, trials: "Sequence[Trial]") -> "Writer":
        from sdedit.image import to_image
        from sdedit.sheet import Cell, contact_sheet

        firsts, seed = [to_image(guide) for guide in self.tuner.guides], self.tuner.options.seed
        columns = ["guide", *(described(trial).replace(", ", "\n", 1) for trial in trials)]
        cells: list[list[Cell]]
        if self._guides is None:
            rows = [f"seed {seed + n}" for n in range(self.tuner.options.samples)]
            cells = [[None, *(to_image(trial.pictures[0][n]) for trial in trials)] for n in range(len(rows))]
            cells[0][0] = firsts[0]
        else:
            rows = [guide.stem for guide in self._guides[: len(firsts)]]
            cells = [
                [guide, *([to_image(pixels) for pixels in trial.pictures[n]] for trial in trials)]
                for n, guide in enumerate(firsts)
            ]
            if len(firsts) < len(self._guides):
                say(f"the sheet shows the first {len(firsts)} of {len(self._guides)} guides")
        drawn = contact_sheet(cells, columns=columns, rows=rows)
        return lambda file: drawn.save(file, "PNG", compress_level=1)  # a tenth larger, in a third of the time


def with_bar(tuner: "Tuner", t0s: list[float]) -> "list[Trial]":
    bar = ProgressBar("edits")
    try:
        return tuner.at(t0s, on_batch=bar.update)
    finally:
        bar.close()


def search(tuner: "Tuner", measure: str, arguments: argparse.Namespace, editor: "Editor") -> "Found":
    """Raises OptionError where no t0 has the value, ImageError, ArtifactError."""
    from sdedit.tuning import search_t0

    if measure == "kid":
        compare_with(tuner, arguments, editor)
    found = search_t0(tuner, measure, getattr(arguments, measure), on_trial=lambda trial: say(described(trial)))
    if not found.within:
        wanted = f"{measure.upper()} <= {getattr(arguments, measure):g}"
        say(f"of {len(found.trials)} t0 tried, t0 = {found.trial.t0:g} is the best that keeps to {wanted}")
    return found


def compare_with(tuner: "Tuner", arguments: argparse.Namespace, editor: "Editor") -> None:
    """Let trials have a KID to the pictures in --real, which enter the model's frame as guides do."""
    import numpy as np

    from sdedit import image
    from sdedit.cli.networks import open_features
    from sdedit.listing import pictures_of

    features, folder = open_features(arguments.features, arguments.feature_input), Path(arguments.real)
    jobs = (editor.prepare(folder / name, tuner.options) for name in pictures_of(folder))
    rows = [features(image.to_pixels(job.x)[None])[0] for job in jobs]
    tuner.compare_with(features, np.stack(rows))


def by_eye(shown: Shown, target: Path) -> "list[Trial]":
    """Halve what is left of t0 with every answer. The chosen trial first, then the others as they were seen."""
    from sdedit import output
    from sdedit.tuning import DIGITS, EARLIEST

    tuner = shown.tuner
    low, high = EARLIEST, tuner.latest
    seen: list[Trial] = []
    while True:
        t0 = round((low + high) / 2, DIGITS)
        (trial,) = tuner.at([t0])
        output.replace(target, shown.sheet([trial]))
        say(f"{described(trial)}: look at {target}")
        answer = ask()
        if answer == "d" or high - low <= 2 * 10**-DIGITS:
            return [trial, *seen]
        seen.append(trial)
        low, high = (low, t0) if answer == "f" else (t0, high)


def ask() -> str:
    """f, r or d; the end of the input is d."""
    while True:
        print("[f] more faithful  [r] more real  [d] done: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""  # closed by the caller
        answer = line.strip().lower()[:1] if line else "d"
        if answer in ("f", "r", "d"):
            return answer
        say("answer f, r or d, and Enter")


def described(trial: "Trial") -> str:
    realism = "" if trial.kid is None else f", KID {trial.kid:.4g}"
    return f"t0 = {trial.t0:g}, L2 {trial.l2:.4g}{realism}"


def again(
    arguments: argparse.Namespace, tuner: "Tuner", folders: list[Path], trials: "Sequence[Trial]", best: "Trial | None"
) -> str:
    """The command that makes these results again: the sheet, or the edit from the t0 that was found.

    For a set: one that edits its guides from that t0, one result each, in a folder of their own.
    """
    from sdedit.cli.repeat import command_line

    options = tuner.options
    seeds = ["--seed", str(options.seed)]
    steps = ["--steps", str(options.steps), *seeds]
    if best is None:
        what = ["--set", str(folders[0])] if folders else [arguments.guide]
        t0s = ",".join(repr(trial.t0) for trial in trials)
        words = ["tune", *what, "-o", arguments.output, "--t0", t0s, *steps, "-n", str(options.samples), "--force"]
    elif folders:
        edited = beside(folders[0])
        words = ["batch", str(folders[0]), "-o", edited, "--t0", repr(best.t0), *steps]
        return f"mkdir -p {shlex.quote(edited)} && {command_line(words, arguments)}"
    else:
        out = no_flag(f"{Path(arguments.guide).stem}-edited.png")
        words = ["edit", no_flag(arguments.guide), "-o", out, "--t0", repr(best.t0), *steps, "-n", str(options.samples)]
    return command_line(words, arguments)


def beside(folder: Path) -> str:
    """Where the results of a folder may go: here, or beside it where here is inside it."""
    import os

    folder = folder.resolve()
    edited = folder.with_name(f"{folder.name}-edited")
    inside = Path.cwd().is_relative_to(folder)
    return no_flag(os.path.relpath(edited) if inside else edited.name)


def no_flag(name: str) -> str:
    """A file's name as an argument."""
    return f"./{name}" if name.startswith("-") else name


def report(
    editor: "Editor",
    tuner: "Tuner",
    trials: "Sequence[Trial]",
    best: "Trial | None",
    target: Path | None,
    command: str,
) -> dict[str, Any]:
    """The object that --json prints."""
    from dataclasses import asdict

    def numbers(trial: "Trial") -> dict[str, float | None]:
        return {"t0": trial.t0, "l2": trial.l2, "kid": trial.kid}

    return {
        **({} if best is None else numbers(best)),
        "edits": [numbers(trial) for trial in trials],
        "options": asdict(tuner.options),
        "backend": {"name": editor.backend.name, "precision": editor.backend.precision, **editor.backend.versions},
        "model": {"name": editor.artifact.name, "sha256": editor.artifact.sha256},
        "sheet": None if target is None else str(target),
        "command": command,
    }
