"""The manifest of a folder job: JSON Lines, one object for every file that is finished, done or failed.

    {"path": "a/b.jpg", "output": "a/b.png", "status": "done", "seed": …, "guide_sha256": …, "mask_sha256": …,
     "output_sha256": …, "options": {…}, "artifact_sha256": …, "backend": …}
    {"path": "a/c.jpg", "output": "a/c.png", "status": "failed", …, "error": …, "hint": …}

Files at URLs also have "stamps", of output, guide and mask. A process may die at any moment: lines are appended whole
and synced, and a torn last line is one that never was.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdedit.errors import OutputError

NAME = "manifest.jsonl"
DONE, FAILED = "done", "failed"
Entry = dict[str, Any]


def read(path: Path, *, shown: Path | str | None = None) -> dict[str, Entry]:
    """The entries by their guide's path; the last one where a path has several. Raises OutputError.

    shown: what messages call it, if it is a copy.
    """
    shown = shown or path
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(
            f"{shown}: cannot be read: {error.strerror or error}", hint="choose another folder"
        ) from error
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines[:-1], start=1):  # behind the last newline is nothing, or a torn line
        entry = _entry(line)
        if entry is not None:
            entries.pop(entry["path"], None)
            entries[entry["path"]] = entry
        elif number < len(lines) - 1:
            raise OutputError(
                f"{shown}: line {number} is not of a manifest", hint="choose another folder, or --force to start over"
            )
    return entries


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the manifest by these entries, at once."""
    scratch = path.with_name(f".{path.name}.new")
    with open(scratch, "wb") as file:
        for entry in entries:
            file.write(_line(entry))
        _sync(file.fileno(), file.flush)
    os.replace(scratch, path)


def append(path: Path, entries: Sequence[Entry]) -> None:
    """Add entries. They are on the disk when this returns."""
    with open(path, "ab") as file:
        file.write(b"".join(map(_line, entries)))
        _sync(file.fileno(), file.flush)


def _entry(line: bytes) -> Entry | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = ("path", "output", "status")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in texts):
        return None
    return found


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _sync(descriptor: int, flush: Any) -> None:
    flush()
    os.fsync(descriptor)
