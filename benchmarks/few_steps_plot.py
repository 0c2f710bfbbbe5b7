"""The plot of few_steps.py (a row a measure, a column a spacing, a line a sampler) and its sheet of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import look
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from samples import Pictures

import sdedit

Row = dict[str, Any]

COLORS = dict(zip(sdedit.SAMPLERS, (look.RED, look.BLUE, look.ORANGE, look.GREEN, look.PURPLE), strict=True))
TITLES = {"uniform": "uniform in t", "log-sigma": "uniform in log σ", "karras": "Karras (ρ = 7)"}
SHOWN_GUIDES = 8
MEASURES = {
    "kid": ("KID to photographs ×10³", 1e3),
    "to_em500": ("KID to em-500's results ×10³", 1e3),
    "l2": ("L2 to the guide", 1.0),
}


def draw(study: dict[str, Any], path: Path) -> None:
    """study: what few_steps.json holds."""
    rows: list[Row] = study["settings"]
    reference = next(row for row in rows if (row["steps"], row["run"]) == (500, "a"))
    again = next((row for row in rows if (row["steps"], row["run"]) == (500, "b")), reference)
    figure, axes = look.figure(8.4, nrows=len(MEASURES), ncols=len(TITLES), sharex=True, sharey="row")
    for panel, spacing in zip(axes[0], TITLES, strict=True):
        panel.set_title(TITLES[spacing])
    for line, (measure, (label, scale)) in zip(axes, MEASURES.items(), strict=True):
        level = again if measure == "to_em500" else reference
        for panel, spacing in zip(line, TITLES, strict=True):
            _panel(panel, [row for row in rows if row["spacing"] == spacing and row["steps"] < 500], measure, scale)
            _level(panel, level[measure], scale)
        line[0].set_ylabel(label)
    axes[0][0].set_yscale("log")
    axes[1][0].set_yscale("symlog", linthresh=1)
    for panel in axes[:2, 0]:
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    axes[0][0].yaxis.set_major_locator(FixedLocator([50, 70, 100, 150, 200, 300, 400]))
    axes[1][0].yaxis.set_major_locator(FixedLocator([-1, 0, 1, 10, 100]))
    steps = sorted({row["steps"] for row in rows if row["steps"] < 500})
    for panel in axes[-1]:
        panel.set_xscale("log")
        panel.set_xticks(steps, [str(n) for n in steps])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("network evaluations")
    figure.legend(*_legend(axes), loc="outside upper center", ncol=6)
    figure.supxlabel(title(study), fontsize=9)
    look.save(figure, path)


def closest(rows: list[Row], steps: Sequence[int]) -> list[Row]:
    """For each number of steps the row whose results are distributed most like em-500's."""
    ours = [[row for row in rows if row["steps"] == n] for n in steps]
    return [min(some, key=lambda row: float(row["to_em500"]["value"])) for some in ours if some]


def sheet(columns: Mapping[str, Pictures], path: Path) -> None:
    """The first guides, a row each."""
    rows = [[pictures[i] for pictures in columns.values()] for i in range(SHOWN_GUIDES)]
    look.sheet(rows, list(columns)).save(path)


def _panel(panel: Axes, rows: list[Row], measure: str, scale: float) -> None:
    for sampler, color in COLORS.items():
        ours = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: int(row["steps"]))
        if not ours:
            continue
        values = [scale * row[measure]["value"] for row in ours]
        errors = [scale * row[measure]["standard_error"] for row in ours]
        steps = [row["steps"] for row in ours]
        panel.errorbar(steps, values, errors, color=color, marker="o", markersize=3.5, linewidth=1.4, label=sampler)


def _level(panel: Axes, figures: dict[str, float], scale: float) -> None:
    """The reference: a line, and a band of two standard errors."""
    value, error = scale * figures["value"], scale * figures["standard_error"]
    panel.axhline(value, color=look.INK, linestyle="--", linewidth=1, label="em, 500 steps (±2 s.e.)")
    panel.axhspan(value - 2 * error, value + 2 * error, color=look.INK, alpha=0.08, linewidth=0)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [*(name for name in COLORS if name in found), *(name for name in found if name not in COLORS)]
    return [found[label] for label in labels], labels


def title(study: dict[str, Any]) -> str:
    """Says how much of the study there is."""
    name, guides = study["conditions"]["model"]["name"], study["conditions"]["guides"]
    made = "" if study["done"] == study["of"] else f"; {study['done']} of {study['of']} settings"
    return f"{name}, t0 0.5, {guides} stroke guides{made}; bars: ± standard error"
