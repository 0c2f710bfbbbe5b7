"""The record a PNG carries: everything it takes to make the same bytes again, and nothing private.

One JSON object in the text chunk `sdedit`. Files are named by SHA-256, never by path.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from PIL import Image

import sdedit
from sdedit.backends.ort import MOST_THREADS
from sdedit.budget import Budget
from sdedit.checks import whole
from sdedit.editor import Editor
from sdedit.errors import ReplayError, SdeditError
from sdedit.noise import SPECIFICATION
from sdedit.options import EditOptions, make_options
from sdedit.results import EditResult, Result

KEYWORD = "sdedit"
ADDED_LATER = {"region", "spacing"}  # options that older records do not have: they were made with today's default
FORMAT = 1


def make(editor: Editor, result: EditResult, index: int) -> dict[str, Any]:
    """The record of result number `index`, as if it had been made alone."""
    record = describe(editor, result.options, result.results[index])
    return record | {"budget": asdict(result.budget)} if result.budget else record


def describe(editor: Editor, options: EditOptions, one: Result) -> dict[str, Any]:
    """The record of one result that was made with these options and its own seed."""
    backend = editor.backend
    told = {"provider_options": dict(backend.provider_options)} if backend.provider_options else {}
    return {
        "format": FORMAT,
        "options": asdict(replace(options, seed=one.seed, samples=1)),
        "noise": SPECIFICATION,
        "artifact": {"name": editor.artifact.name, "sha256": editor.artifact.sha256},
        "guide": {"sha256": one.guide.sha256},
        "mask": None if one.mask is None else {"sha256": one.mask.sha256},
        "backend": {"name": backend.name, "precision": backend.precision, "threads": backend.threads, **told},
        "versions": versions(editor),
    }


def versions(editor: Editor) -> dict[str, str]:
    """Of everything that decides a result's bytes."""
    return {
        "sdedit-engine": sdedit.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        **editor.backend.versions,
    }


@dataclass(frozen=True)
class Record:
    """A record that was read back and checked."""

    options: EditOptions
    backend: str
    precision: str
    threads: int
    provider_options: Mapping[str, str]
    artifact_sha256: str
    guide_sha256: str
    mask_sha256: str | None
    versions: Mapping[str, str]
    budget: Budget | None = None  # why these steps


def read(path: Path) -> Record:
    """The record of a PNG written by `sdedit edit`. Raises ReplayError."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ReplayError(
            f"{path}: its record has format {found.get('format')!r}; wanted {FORMAT}", hint="upgrade sdedit-engine"
        )
    if found.get("noise") != SPECIFICATION:
        raise ReplayError(
            f"{path}: was made with noise {found.get('noise')!r}; this engine makes {SPECIFICATION}",
            hint="use the version of sdedit-engine named in 'sdedit inspect'",
        )
    try:
        mask, options = found["mask"], found["options"]
        wanted = {f.name for f in fields(EditOptions)}
        if set(options) | ADDED_LATER != wanted or options["samples"] != 1:
            raise ValueError(f"its options are {', '.join(options) or 'none'}")
        return Record(
            make_options(options).resolved({}),
            str(found["backend"]["name"]),
            str(found["backend"]["precision"]),
            whole("threads", found["backend"]["threads"], 1, MOST_THREADS, hint=""),
            {str(name): str(value) for name, value in found["backend"].get("provider_options", {}).items()},
            str(found["artifact"]["sha256"]),
            str(found["guide"]["sha256"]),
            None if mask is None else str(mask["sha256"]),
            dict(found["versions"]),
            Budget(**found["budget"]) if "budget" in found else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, SdeditError) as error:
        raise ReplayError(
            f"{path}: its record is damaged: {error}", hint="replay the file as it was written"
        ) from error


def read_json(path: Path | IO[bytes]) -> dict[str, Any]:
    """The record as it stands in the file, or its bytes. Raises ReplayError."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:  # JPEG: to say that it has no record
            text = opened.info.get(KEYWORD)
    except FileNotFoundError:
        raise ReplayError(f"{path}: no such file", hint="name a PNG that 'sdedit edit' wrote") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ReplayError(f"{path}: not a picture: {error}", hint="name a PNG that 'sdedit edit' wrote") from error
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ReplayError(
            f"{path}: carries no record", hint="only PNGs written by 'sdedit edit', unchanged, can be replayed"
        )
    return found


def require_same(what: str, recorded: str | None, found: str | None) -> None:
    """Raise ReplayError unless two SHA-256 agree."""
    if recorded != found:
        want = "wants none" if recorded is None else f"wants SHA-256 {recorded[:12]}…"
        have = "none was given" if found is None else f"this one has {found[:12]}…"
        hint = f"leave --{what} out" if recorded is None else f"give the same {what} file"
        raise ReplayError(f"the {what} is not the one recorded: the record {want}, {have}", hint=hint)
