"""The trade-off as a figure, tables and sentences, all from trade_off.json."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import look
import numpy as np
from samples import Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_T0S = (0.1, 0.3, 0.5, 0.7, 0.9)
SHOWN_GUIDES, SHOWN_SAMPLES = 5, 8
PAPER_COLORS = {3: 0.0233, 6: 0.0156, 16: 0.0135, 30: 0.0128, 50: 0.0126}  # KID on churches, its table 4

Report = Mapping[str, Any]
Rows = list[dict[str, Any]]


def draw(report: Report, folder: Path) -> None:
    """trade_off.png and trade_off.md."""
    figure, axes = look.figure(6.4, nrows=2, ncols=2)
    _against_t0(axes[0, 0], report)
    _against_colors(axes[0, 1], report)
    _against_repeats(axes[1, 0], report)
    _against_steps(axes[1, 1], report)
    look.save(figure, folder / "trade_off.png")
    (folder / "trade_off.md").write_text("\n".join(text(report)) + "\n")


def show(photos: Pictures, painted: Pictures, made: Mapping[float, Pictures], folder: Path) -> None:
    """trade_off_pictures.png: photographs, strokes and results."""
    columns = ["photograph", "guide", *(f"t0 = {t0}" for t0 in made)]
    rows = [[photos[i], painted[i], *(pictures[i] for pictures in made.values())] for i in range(SHOWN_GUIDES)]
    look.sheet(rows, columns).save(folder / "trade_off_pictures.png")


def show_samples(pictures: Pictures, folder: Path) -> None:
    """trade_off_samples.png: results from noise alone, where nothing of the guide is left."""
    rows = [list(pictures[at : at + SHOWN_SAMPLES]) for at in range(0, 4 * SHOWN_SAMPLES, SHOWN_SAMPLES)]
    columns = ["t0 = 1"] * SHOWN_SAMPLES
    look.sheet(rows, columns).save(folder / "trade_off_samples.png")


def _against_t0(axes: "Axes", report: Report) -> None:
    rows = report.get("t0", [])
    _two_scales(axes, rows, "t0")
    guide = _guide(report, 6)
    axes.axhline(guide["kid"], color=look.REALISM, linestyle=":", linewidth=1.2, label="the guides themselves")
    axes.legend(loc="upper left")
    axes.set(
        title="Where the edit starts (paper, figure 3)",
        xlabel="t0: faithful … realistic",
        xticks=np.arange(1, 10, 2) / 10,
    )


def _against_colors(axes: "Axes", report: Report) -> None:
    rows = report.get("colors", [])
    _two_scales(axes, rows, "colors")
    axes.set(title="How much the guide says (paper, table 4)", xlabel="colours of the strokes", xscale="log")
    axes.set_xticks(list(PAPER_COLORS), [str(count) for count in PAPER_COLORS])
    axes.minorticks_off()


def _against_repeats(axes: "Axes", report: Report) -> None:
    _two_scales(axes, report.get("repeats", []), "repeats", apart=0.05)
    axes.set(title="Passes", xlabel="K", xticks=[1, 2, 3], xlim=(0.8, 3.2))


def _against_steps(axes: "Axes", report: Report) -> None:
    for sampler, color, marker in (("em", look.RED, "s"), ("ancestral", look.REALISM, "o")):
        rows = [row for row in report.get("samplers", []) if row["sampler"] == sampler]
        _curve(axes, rows, "steps", "kid", color, marker, label=sampler)
    axes.set(title="Steps and their noise", xlabel="steps N", xscale="log")
    axes.set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.legend()
    look.colored(axes, "KID", look.INK)


def _two_scales(axes: "Axes", rows: Rows, x: str, apart: float = 0.0) -> None:
    """apart: how far the two curves stand to the sides of their x, so that neither hides the other."""
    right = look.second_scale(axes, "L2 to the guide", look.FAITHFULNESS)
    look.colored(axes, "KID", look.REALISM)
    left, beside = ([row | {x: row[x] + at} for row in rows] for at in (-apart, apart))
    _curve(axes, left, x, "kid", look.REALISM, "o")
    _curve(right, beside, x, "l2", look.FAITHFULNESS, "s")


def _curve(axes: "Axes", rows: Rows, x: str, y: str, color: str, marker: str, label: str | None = None) -> None:
    if rows:
        xs, ys, errors = zip(*((row[x], row[y], row[f"{y}_se"]) for row in rows), strict=True)
        axes.errorbar(xs, ys, errors, color=color, marker=marker, label=label)


def _guide(report: Report, colors: int) -> dict[str, Any]:
    return next(row for row in report["guide"] if row["colors"] == colors)


# --- words -------------------------------------------------------------------------------------------------------


def text(report: Report) -> Iterator[str]:
    """trade_off.md, line by line."""
    made = report["conditions"]
    kid, base = made["kid"], made["base"]
    yield from (
        "# Realism against faithfulness",
        "",
        "![KID and L2 against t0, colours, repeats and steps](trade_off.png)",
        "",
        "![Strokes edited from five values of t0](trade_off_pictures.png)",
        "",
        "![Results at t0 = 1](trade_off_samples.png)",
        "",
        f"{made['guides']} stroke paintings of held-out EuroSAT photographs, one result each ({made['seeds']}), edited "
        f"by `{made['model']['name']}` ({made['model']['sha256'][:12]}) on `{made['backend']}`; t0 {base['t0']}, "
        f"{base['steps']} `{base['sampler']}` steps ({base['spacing']}), K = {base['repeats']} and {base['colors']} "
        f"colours where nothing else is said. KID: to all {made['real']} held-out photographs "
        f"(those that the strokes were painted from are among them), {kid['subsets']} subsets of {kid['subset_size']}, "
        f"± the standard error that `sdedit.kid` defines; features of `{made['features']['name']}` "
        f"({made['features']['sha256'][:12]}, {made['features']['input']}). L2: √Σ of squared differences to the guide "
        "in [0, 1], mean over guides. KIDs of 64×64 photographs enlarged to 299 pixels compare with each other, not "
        "with those of other data.",
        "",
        "Written by `benchmarks/trade_off.py` from `trade_off.json`.",
        "",
    )
    yield from ("## Beside the paper", "")
    for claim in _claims(report):
        yield f"- {claim}"
    yield from ("", "## Figures", "")
    yield from _quality(report)
    yield from _table(report.get("t0", []), "t0", "t0")
    yield from _table(report.get("colors", []), "colors", "colours")
    yield from _table(report.get("repeats", []), "repeats", "K")
    yield from _samplers(report)
    if "masked" in report:
        yield from _masked(report["masked"])
    if report.get("bound"):
        yield from _bound(report["bound"])


def _quality(report: Report) -> Iterator[str]:
    """The two figures that say how good the model is."""
    edited = [row for row in report.get("t0", []) if row["t0"] == report["conditions"]["base"]["t0"]]
    for sampled, edit in zip(report.get("sampling", []), edited, strict=False):
        how = f"{sampled['steps']} `{sampled['sampler']}` steps, {sampled['spacing']}"
        yield f"The model: KID {_pm(sampled, 'kid', 4)} from noise alone (t0 = {sampled['t0']:g}; {how}), "
        yield f"and {_pm(edit, 'kid', 4)} from strokes at t0 = {edit['t0']}."
        yield ""


def _table(rows: Rows, x: str, title: str) -> Iterator[str]:
    yield from (f"| {title} | KID | L2 |", "| ---: | ---: | ---: |")
    for row in rows:
        yield f"| {row[x]} | {_pm(row, 'kid', 4)} | {_pm(row, 'l2', 2)} |"
    yield ""


def _samplers(report: Report) -> Iterator[str]:
    yield from ("`em` and `ancestral`, steps uniform in t:", "")
    yield from ("| N | `em` | `ancestral` | `em` − `ancestral`, paired |", "| ---: | ---: | ---: | ---: |")
    found = {(row["sampler"], row["steps"]): row for row in report.get("samplers", [])}
    paired = {row["one"]["steps"]: row for row in report.get("differences", [])}
    for steps in sorted({steps for _, steps in found}):
        cells = [_pm(row, "kid", 4) if row else "" for row in (
            found.get(("em", steps)), found.get(("ancestral", steps)), paired.get(steps)
        )]  # fmt: skip
        yield f"| {steps} | {' | '.join(cells)} |"
    yield ""


def _masked(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Masked edits ({found['photographs']} photographs, an ellipse of strokes in each): the largest L2 outside the "
        f"mask is {found['l2_outside_max']:g}; inside it is {found['l2_inside_mean']:.2f} in the mean."
    )
    yield ""


def _bound(rows: Rows) -> Iterator[str]:
    first = rows[0]
    yield from (
        f"Proposition 1 bounds ‖guide − result‖² with probability {1 - first['delta']:g} if ‖score‖² ≤ C. For values "
        f"in [-1, 1], over {first['guides']} guides, with C the largest ‖score‖² that these edits met (their last "
        "step's: a sharp picture's score grows as 1/σ²), and with C = 0, its noise alone. Its proof bounds "
        "x(t0) − x(0), not guide − x(0), and drops the cross term of noise and drift: an order of magnitude, not a "
        "guarantee.",
        "",
        "| t0 | σ(t0) | measured, mean | measured, largest | bound | bound, C = 0 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    )
    for row in rows:
        values = (row["measured_mean"], row["measured_max"], row["bound"], row["bound_of_noise"])
        yield f"| {row['t0']} | {row['sigma']:.3g} | {' | '.join(f'{value:.3g}' for value in values)} |"


def _claims(report: Report) -> Iterator[str]:
    """What the paper says, beside what was found."""
    t0s = [row for row in report.get("t0", []) if row["t0"] < 1]
    if len(t0s) > 2:
        best = min(t0s, key=lambda row: row["kid"])
        rising = all(one["l2"] < other["l2"] for one, other in pairwise(t0s))
        yield (
            f"L2 {'rises' if rising else 'does **not** rise'} with every t0 (paper: rises): {t0s[0]['l2']:.1f} at "
            f"{t0s[0]['t0']} to {t0s[-1]['l2']:.1f} at {t0s[-1]['t0']}."
        )
        worst = max(t0s[: t0s.index(best) + 1], key=lambda row: row["kid"])
        turning = [row for row in t0s if row in (t0s[0], worst, best, t0s[-1])]
        turns = [f"{_pm(row, 'kid', 3)} at t0 = {row['t0']}" for row in turning]
        falling = all(one["kid"] > other["kid"] for one, other in pairwise(t0s))
        yield (
            f"KID {'falls with t0' if falling else 'does **not** fall all along'} (paper: falls): {', '.join(turns)}; "
            f"the guides themselves have {_pm(_guide(report, 6), 'kid', 3)}."
        )
    colors = report.get("colors", [])
    if len(colors) > 2:
        falling = all(one["kid"] > other["kid"] for one, other in pairwise(colors))
        ratio = colors[0]["kid"] / colors[-1]["kid"]
        wanted = PAPER_COLORS[colors[0]["colors"]] / PAPER_COLORS[colors[-1]["colors"]]
        yield (
            f"KID {'falls' if falling else 'does **not** fall'} with every step from {colors[0]['colors']} to "
            f"{colors[-1]['colors']} colours (paper: falls), by a factor of {ratio:.2f} (paper: {wanted:.2f})."
        )
    passes = report.get("repeats", [])
    if len(passes) > 1:
        said = ", ".join(f"{_pm(row, 'kid', 3)} at K = {row['repeats']}" for row in passes)
        l2s = f"{passes[0]['l2']:.1f} to {passes[-1]['l2']:.1f}"
        yield f"More passes: KID {said}; L2 {l2s}."
    for better, sign in (("worse", 1), ("better", -1)):
        surely = [row for row in report.get("differences", []) if sign * row["kid"] > 2 * row["kid_se"]]
        if surely:
            said = ", ".join(f"{_pm(row, 'kid', 4)} at N = {row['one']['steps']}" for row in surely)
            yield f"KID of `em` less `ancestral`'s, paired: {said}. `em` is {better}, by more than twice the error."


def _pm(row: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f} ± {row[f'{name}_se']:.{digits}f}"
