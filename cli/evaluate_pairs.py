"""`sdedit evaluate --pairs` and `--answers`: the paper's user study with one's own people."""

import argparse
from dataclasses import asdict
from pathlib import Path

from sdedit.cli.evaluate import checked_output, write_text
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json
from sdedit.errors import OptionError

COUNT = 50
MOST_SEED = 2**53 - 1  # larger numbers are not what they were when the page has read them
MEASURED = ("methods", "real", "masks", "features", "feature_input", "lpips", "subset_size", "subsets")


def write_page(arguments: argparse.Namespace) -> int:
    """Raises ImageError, OptionError, OutputError."""
    from sdedit.checks import whole
    from sdedit.cli.pairs_page import pairs_page
    from sdedit.opinions import QUESTIONS, trials
    from sdedit.pairing import open_folder, require_pairs, require_size

    _refuse_measures(arguments, "--pairs")
    if arguments.output is None:
        raise OptionError("--pairs needs -o PAIRS.html", hint="name the page to write")
    target = checked_output(arguments, (".html",))
    assert target is not None
    seed = 0 if arguments.seed is None else arguments.seed
    seed = whole("seed", seed, 0, MOST_SEED, hint="leave it out for 0")
    count = COUNT if arguments.count is None else arguments.count
    count = whole("count", count, 1, 10_000, hint="leave it out for 50")
    a, b = (open_folder(Path(folder)) for folder in arguments.pairs)
    guides = None if arguments.guides is None else open_folder(Path(arguments.guides))
    if a.folder.resolve() == b.folder.resolve():
        raise OptionError(f"--pairs names {a.folder} twice", hint="name the folders of two methods")
    require_pairs(a, b)
    require_size(b, a.size)
    if guides is not None:
        require_pairs(guides, a)
    asked = [question for question in QUESTIONS if question == "realism" or guides is not None]
    drawn = trials(list(a.files), asked, count=count, seed=seed)
    study = {"a": str(a.folder), "b": str(b.folder), "seed": seed}
    write_text(target, pairs_page(study, QUESTIONS, drawn, (a, b, guides), a.size), force=arguments.force)
    if arguments.json:
        print_json({"output": str(target), "pairs": min(count, len(a)), "questions": asked, "seed": seed})
    else:
        print(target)
    return OK


def read_answers(arguments: argparse.Namespace) -> int:
    """Raises OptionError."""
    from sdedit.cli.evaluation_report import in_table
    from sdedit.opinions import QUESTIONS, preferences

    _refuse_measures(arguments, "--answers")
    unused = ("pairs", "guides", "count", "seed", "output")
    if given := [name for name in unused if getattr(arguments, name) is not None]:
        raise OptionError(
            f"--answers is read alone, without --{given[0]}", hint="sdedit evaluate --answers FILE.json …"
        )
    a, b, found = preferences(arguments.answers)
    if arguments.json:
        print_json({"a": a, "b": b, "files": len(arguments.answers), "preferences": [asdict(one) for one in found]})
        return OK
    a, b = in_table(a), in_table(b)
    print(f"| {a} or {b}? | for {a} | 95 % interval | answers |\n| --- | ---: | ---: | ---: |")
    for one in found:
        interval = f"{100 * one.low:.1f} … {100 * one.high:.1f} %"
        print(f"| {QUESTIONS[one.question]} | {100 * one.share_a:.1f} % | {interval} | {one.answers} |")
    return OK


def _refuse_measures(arguments: argparse.Namespace, mode: str) -> None:
    """Flags that would be ignored. Raises OptionError."""
    if given := [name for name in MEASURED if getattr(arguments, name)]:
        flag = f"--{given[0].replace('_', '-')}"
        raise OptionError(f"{flag} is not for {mode}", hint=f"measure in one run, without {mode}; ask in another")
