"""What `sdedit evaluate` found, as JSON, CSV, Markdown, or a page with pictures; one schema, four printers."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdedit.cli.page import data_url, page

if TYPE_CHECKING:
    from sdedit.evaluation import Inputs, Measures

COLUMNS = {
    "kid": "KID",
    "l2": "L2",
    "lpips": "LPIPS",
    "masked_lpips": "masked LPIPS",
    "outside": "L2 outside the mask",
}  # of the table, as far as measured
SHOWN, THUMBNAIL = 8, 160  # rows of pictures; the longest side in pixels

Report = Mapping[str, Any]


def as_report(conditions: Report, rows: "Sequence[Measures]") -> dict[str, Any]:
    """What --json prints."""
    from dataclasses import asdict

    return {"conditions": dict(conditions), "methods": [asdict(row) for row in rows]}


def as_csv(report: Report) -> str:
    """One line a method; what was not measured is empty."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    names = [f"{name}{part}" for name in COLUMNS for part in ("", "_standard_error")]
    conditions = (f"{name}_network" if name in COLUMNS else name for name in report["conditions"])  # of LPIPS, say
    rows.writerow(["method", *names, "outside_largest", *conditions])
    for row in report["methods"]:
        cells = [(row[name] or {}).get(key) for name in COLUMNS for key in ("value", "standard_error")]
        largest = (row["outside"] or {}).get("largest")
        rows.writerow([row["method"], *cells, largest, *map(_plain, report["conditions"].values())])
    return written.getvalue()


def as_markdown(report: Report) -> str:
    head, *rows = _cells(report)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(map(in_table, cells))} |" for cells in lines)
    return f"{table}\n\n" + "\n".join(f"- {line}" for line in _stated(report["conditions"])) + "\n"


def in_table(text: str) -> str:
    """A cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def as_html(report: Report, inputs: "Inputs") -> str:
    """The table, what it was made with, and the first guides with every method's results."""
    from sdedit.evaluation import GUIDES

    head, *rows = _cells(report)
    table = _table(head, [[html.escape(cell) for cell in row] for row in rows])
    stated = "".join(f"<li>{html.escape(line)}" for line in _stated(report["conditions"]))
    folders = {GUIDES: inputs.guides, **inputs.methods}
    pictures = [
        [html.escape(name), *(_thumbnail(folder.files[name], name, label) for label, folder in folders.items())]
        for name in inputs.names[:SHOWN]
    ]
    shown = len(pictures)
    title = "Realism and faithfulness"
    body = (
        f"<h1>{title}</h1>\n<div class=wide>{table}</div>\n<h2>How it was measured</h2>\n<ul>{stated}</ul>\n"
        f"<h2>Pictures</h2>\n<p class=soft>The first {shown} of {len(inputs.guides)} by name.</p>\n"
        f"<div class=wide>{_table(['', *folders], pictures)}</div>"
    )
    style = "td:has(img) { padding: .3rem } td img { margin: 0 0 0 auto } ul { padding-left: 1.2rem }"
    return page(title, body, style=style)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as they are, heads escaped."""
    heads = "".join(f"<th>{html.escape(cell)}" for cell in head)
    return f"<table><tr>{heads}" + "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows) + "</table>"


def _thumbnail(path: Any, name: str, label: str) -> str:
    import numpy as np

    from sdedit import image

    picture = image.to_image(image.read(path, 3, "picture").pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = picture.size
    scale = max(1, THUMBNAIL // max(width, height))
    return (
        f'<img src="{data_url(np.asarray(picture))}" width={width * scale} height={height * scale} '
        f'alt="{html.escape(f"{label}: {name}")}">'
    )


def _cells(report: Report) -> list[list[str]]:
    """The table as text, its head first: only columns that some method has."""
    shown = [name for name in COLUMNS if any(row[name] is not None for row in report["methods"])]
    head = ["method", *(COLUMNS[name] for name in shown)]
    return [head, *([row["method"], *(_cell(name, row[name]) for name in shown)] for row in report["methods"])]


def _cell(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if name == "outside":
        return "0" if found["largest"] == 0 else f"{found['value']:.3f}, largest {found['largest']:.3f}"
    digits = 2 if name == "l2" else 4
    error = found["standard_error"]
    return f"{found['value']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _stated(conditions: Report) -> list[str]:
    """The conditions in words."""
    own, size = ("{}×{}".format(*conditions[name]) for name in ("guide_size", "size"))
    fitted = "" if own == size else f", fitted to the results' {size} by the centred crop"
    said = [
        f"{conditions['guides']} guides of {own} pixels{fitted}, paired by name; ± is a standard error",
        "L2: √Σ of squared differences to the guide, values in [0, 1], mean over guides",
    ]
    if features := conditions["features"]:
        said.append(
            f"KID: to {conditions['real']} real pictures, mean of {features['subsets']} subsets of "
            f"{features['subset_size']} (seed {features['seed']}); features of {features['name']}, "
            f"SHA-256 {features['sha256']}, fed SIZE:LOW:HIGH {features['input']}"
        )
    else:
        said.append("KID: not measured; --features names a feature network, --real the real pictures")
    if lpips := conditions["lpips"]:
        said.append(f"LPIPS: to the guide, by {lpips['name']}, SHA-256 {lpips['sha256']}, fed [-1, 1]")
    else:
        said.append("LPIPS: not measured; --lpips names its network")
    if conditions["masks"] and lpips:
        said.append("masked LPIPS: the same with both pictures grey where the mask repaints")
    if conditions["masks"]:
        said.append("outside the mask: L2 over pixels whose mask is black; 0 means that not one value changed")
    return [*said, f"sdedit-engine {conditions['sdedit-engine']}"]


def _plain(value: Any) -> Any:
    """A condition in one cell."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items())
    return "x".join(map(str, value)) if isinstance(value, list) else value
