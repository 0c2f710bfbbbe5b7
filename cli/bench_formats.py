"""The rows of `sdedit bench` as text, in four formats. What the columns are is Row's."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdedit.bench import Row

Rows = Sequence["Row"]
ALWAYS = ("model", "backend", "precision", "threads", "batch", "steps")  # of the case; others where they differ


def markdown(rows: Rows) -> str:
    """A table for people: what differs and what was measured; below it, the conditions that all rows share."""
    from sdedit.bench.rows import CASE, CONDITION, MEASURED

    columns = fields(rows[0])
    shared = {f.name for f in columns if all(getattr(row, f.name) == getattr(rows[0], f.name) for row in rows)}
    empty = {f.name for f in columns if all(getattr(row, f.name) is None for row in rows)}
    shown = [
        f for f in columns
        if f.metadata["heading"] and f.name not in empty
        and (f.metadata["part"] == MEASURED or f.name in ALWAYS or f.name not in shared)
    ]  # fmt: skip
    cells = [[f.metadata["heading"] for f in shown], *([cell(f, getattr(row, f.name)) for f in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [f.metadata["part"] == MEASURED or isinstance(getattr(rows[0], f.name), int | float) for f in shown]
    lines = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in cells
    ]
    rule = "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + " |"
    below = [f for f in columns if f not in shown and f.metadata["part"] in (CASE, CONDITION)]
    told = [(f, ", ".join(dict.fromkeys(words(getattr(row, f.name)) for row in rows))) for f in below]
    notes = [f"{f.name.replace('_', ' ')}: {text}" for f, text in told if text]
    return "\n".join([lines[0], rule, *lines[1:], "", *notes]) + "\n"


def cell(column: "Field[Any]", value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) or column.metadata["scale"] != 1:
        return f"{value / column.metadata['scale']:.{column.metadata['digits']}f}"
    return " ".join(str(value).split()).replace("|", "\\|")  # a name's line break or bar would end the cell


def words(value: Any) -> str:
    """Any value as one line of text; nothing for None."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def comma_separated(rows: Rows) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(rows[0])])
    writer.writerows([words(value) for value in asdict(row).values()] for row in rows)
    return text.getvalue()


def as_json(rows: Rows) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def as_json_lines(rows: Rows) -> str:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)


FORMATS: dict[str, Callable[[Rows], str]] = {
    "md": markdown, "csv": comma_separated, "json": as_json, "jsonl": as_json_lines,
}  # fmt: skip
