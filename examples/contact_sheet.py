"""The README's contact sheet: each example guide, edited at three t0 with four seeds each.

python examples/contact_sheet.py -o examples/contact-sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image

import sdedit

HERE = Path(__file__).parent
TASKS = (
    ("stroke painting", "strokes.png", None),
    ("photograph with strokes", "photo.png", "photo-mask.png"),
    ("collage", "collage.png", "collage-mask.png"),
)
T0S = (0.3, 0.45, 0.6)
SEEDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", type=Path, help="an artifact (default: the bundled one)")
    arguments = parser.parse_args()
    editor = sdedit.load(arguments.model)
    frame = editor.artifact.width, editor.artifact.height
    cells = []
    for _, guide, mask in TASKS:
        seen = Image.open(HERE / guide).convert("RGB").resize(frame, Image.Resampling.BOX)
        edits = [editor.edit(HERE / guide, mask=mask and HERE / mask, t0=t0, samples=SEEDS) for t0 in T0S]
        cells.append([seen, *(edit.images for edit in edits)])
    columns = ("guide", *(f"t0 = {t0:g}, seeds 0 to {SEEDS - 1}" for t0 in T0S))
    sheet = sdedit.contact_sheet(cells, columns=columns, rows=[label for label, _, _ in TASKS])
    sheet.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
