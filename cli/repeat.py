"""The command line that does something again, to be copied into a shell."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields

PLACED = ("t0", "steps", "seed", "samples", "conditions")  # what the caller writes, and what is spelled otherwise
RUNNING = ("model", "mask", "masks", "backend", "precision", "threads")


def command_line(words: Sequence[str], arguments: argparse.Namespace) -> str:
    """`sdedit`, these words, and the options that were given as they were given."""
    from sdedit.options import EditOptions

    said = ["sdedit", *words]
    for name in (*RUNNING, *(field.name for field in fields(EditOptions) if field.name not in PLACED)):
        value = getattr(arguments, name, None)
        if value is not None and (name, words[0]) != ("batch", "edit"):  # which has no such option
            said += [f"--{name}", "{}x{}".format(*value) if name == "size" else str(value)]
    said += ["--fast"] if arguments.fast else []
    for flag, pairs in (("--set", arguments.set), ("--ep-option", arguments.ep_option)):
        for name, value in pairs or ():
            said += [flag, f"{name}={int(value) if isinstance(value, float) and value.is_integer() else value}"]
    return shlex.join(said)
