"""One look for every plot and sheet of pictures: readable at a README's width, one colour for one meaning."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 9.0, 160  # inches; a README shows about 850 of these 1440 pixels
INK, FAINT = "#24292f", "#d8dee4"
BLUE, ORANGE, GREEN, PURPLE, RED = "#1f6fb2", "#d9662b", "#2e8b57", "#7b56a5", "#b3344a"
REALISM, FAITHFULNESS = BLUE, ORANGE  # KID; L2


def figure(height: float, **layout: Any) -> tuple["Figure", Any]:
    """A figure of WIDTH inches and its axes, as `matplotlib.pyplot.subplots` makes them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": "#8c959f",
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": FAINT,
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "errorbar.capsize": 2.5,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )
    return pyplot.subplots(figsize=(WIDTH, height), dpi=DPI, layout="constrained", **layout)


def second_scale(axes: "Axes", label: str, color: str) -> "Axes":
    """A scale on the right, in the colour of its curve."""
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    colored(right, label, color)
    return right


def colored(axes: "Axes", label: str, color: str) -> None:
    """The vertical scale in the colour of its curve."""
    axes.set_ylabel(label, color=color)
    axes.tick_params(axis="y", colors=color)


def save(drawn: "Figure", path: Path) -> None:
    """As PNG, with no date in it: the same data gives the same bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", metadata={"Software": None})
    path.write_bytes(buffer.getvalue())


def sheet(rows: list[list[NDArray[np.uint8]]], columns: list[str], *, tile: int = 128, gap: int = 4) -> Image.Image:
    """Pictures in a grid under their columns' names, of one line or two; small ones enlarged without smoothing. RGB."""
    font = ImageFont.load_default(size=tile // 8)
    head = tile // 4 * (1 + any("\n" in name for name in columns))
    width, height = len(columns) * (tile + gap) + gap, len(rows) * (tile + gap) + head
    made = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(made)
    for x, name in enumerate(columns):
        draw.text((gap + x * (tile + gap) + tile / 2, head / 2), name, INK, font=font, anchor="mm", align="center")
        for y, row in enumerate(rows):
            one = Image.fromarray(row[x]).resize((tile, tile), Image.Resampling.NEAREST)
            made.paste(one, (gap + x * (tile + gap), head + y * (tile + gap)))
    return made
