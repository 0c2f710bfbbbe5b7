"""A model of a Triton repository as a folder, REPO/NAME, written whole or not at all, and its config.pbtxt as text."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdedit.errors import OptionError, OutputError
from sdedit.output import reason

CONFIG, GRAPH, PLAN = "config.pbtxt", "1/model.onnx", "1/model.plan"
OURS = {CONFIG, GRAPH, f"{GRAPH}.data", PLAN}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Word(str):
    """A value of an enumeration: written without quotes."""


def put(repository: Path, name: str, fill: Callable[[Path], str], *, inputs: Sequence[Path], force: bool) -> Path:
    """Make REPO/NAME. fill: writes the model below a folder that has the folder `1`, and returns its config.pbtxt.

    repository: made if its parent exists. inputs: what must not be replaced. Raises OptionError, OutputError.
    """
    if not NAME.fullmatch(name):
        raise OptionError(
            f"name is {name!r}; a model of Triton is named in letters, digits, '_', '-' and '.'", hint="--name my-edit"
        )
    target = repository / name
    try:
        _check(target, inputs, force)
        new = not repository.exists()
        # Beside what it becomes, since a rename does not leave a file system
        with tempfile.TemporaryDirectory(prefix=".sdedit-", dir=repository.parent if new else repository) as scratch:
            made = Path(scratch, "repository", name)
            (made / "1").mkdir(parents=True)
            (made / CONFIG).write_text(fill(made), "utf-8")
            if new:
                os.rename(made.parent, repository)
            else:
                _exchange(made, target, Path(scratch, "old"))
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {reason(error)}", hint="check the disk and the permissions"
        ) from error
    return target


def _check(target: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raise OutputError before any work if the folder cannot or must not be written."""
    repository = target.parent
    if not repository.parent.is_dir():
        raise OutputError(f"{repository.parent}: no such folder", hint="make the folder first")
    if os.path.lexists(repository) and not repository.is_dir():
        raise OutputError(f"{repository}: is not a folder", hint="name the model repository's folder")
    place = repository if repository.is_dir() else repository.parent
    if not os.access(place, os.W_OK):
        raise OutputError(f"{place}: not writable", hint="choose a folder you may write to")
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target}: exists already", hint="choose another --name, or --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target}: is a file or a link", hint="choose another --name")
    if any(target.resolve() in path.resolve().parents for path in inputs):
        raise OutputError(f"{target}: would overwrite an input", hint="choose another --name")
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    if others := [file for file in files if file not in OURS]:
        raise OutputError(
            f"{target}: holds more than --force replaces: {others[0]}", hint="choose another --name, or move it away"
        )


def _exchange(made: Path, target: Path, old: Path) -> None:
    """Put the new folder in place and the old one into scratch; back again if that fails halfway."""
    existed = os.path.lexists(target)
    if existed:
        os.rename(target, old)
    try:
        os.rename(made, target)
    except BaseException:
        if existed:
            os.rename(old, target)
        raise


def to_text(fields: Mapping[str, Any], indent: str = "") -> str:
    """Fields as protobuf text; several messages of a field one after the other."""
    lines = []
    for name, value in fields.items():
        messages = value if isinstance(value, list) else [value]
        if messages and all(isinstance(one, dict) for one in messages):
            lines += [f"{indent}{name} {{\n{to_text(one, indent + '  ')}{indent}}}\n" for one in messages]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: bool | int | str | Sequence[int]) -> str:
    match value:
        case bool():
            return str(value).lower()
        case Word() | int():
            return str(value)
        case str():
            return json.dumps(value)  # ASCII, with the escapes of both
    return f"[ {', '.join(map(str, value))} ]" if value else "[ ]"
