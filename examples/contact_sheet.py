"""The README's contact sheet: each example guide, edited at three t0 with four seeds each.

python examples/contact_sheet.py -o examples/contact-sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import sdedit

HERE = Path(__file__).parent
TASKS = (
    ("stroke painting", "strokes.png", None),
    ("photograph with strokes", "photo.png", "photo-mask.png"),
    ("collage", "collage.png", "collage-mask.png"),
)
T0S = (0.3, 0.45, 0.6)
SEEDS = 4
CELL, GAP, MARGIN = 128, 6, 34
INK, PAPER = (30, 30, 30), (255, 255, 255)


def block(pictures: list[Image.Image]) -> Image.Image:
    """Four pictures, two by two; one alone fills the block."""
    side = 2 * CELL + GAP
    sheet = Image.new("RGB", (side, side), PAPER)
    if len(pictures) == 1:
        return pictures[0].resize((side, side), Image.Resampling.NEAREST)
    for number, picture in enumerate(pictures):
        cell = picture.resize((CELL, CELL), Image.Resampling.NEAREST)
        sheet.paste(cell, (number % 2 * (CELL + GAP), number // 2 * (CELL + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", type=Path, help="an artifact (default: the bundled one)")
    arguments = parser.parse_args()
    editor = sdedit.load(arguments.model)
    frame = editor.artifact.width, editor.artifact.height
    font = ImageFont.load_default(18)
    side = 2 * CELL + 2 * GAP + GAP
    sheet = Image.new("RGB", (MARGIN + (1 + len(T0S)) * side, MARGIN + len(TASKS) * side), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(("guide", *(f"t0 = {t0:g}, seeds 0 to {SEEDS - 1}" for t0 in T0S))):
        draw.text((MARGIN + column * side + CELL, MARGIN / 2), label, INK, font, anchor="mm")
    for row, (label, guide, mask) in enumerate(TASKS):
        top = MARGIN + row * side
        upright = Image.new("RGB", (side, MARGIN), PAPER)
        ImageDraw.Draw(upright).text((side / 2, MARGIN / 2), label, INK, font, anchor="mm")
        sheet.paste(upright.rotate(90, expand=True), (0, top))
        blocks = [[Image.open(HERE / guide).convert("RGB").resize(frame, Image.Resampling.BOX)]]
        blocks += [editor.edit(HERE / guide, mask=mask and HERE / mask, t0=t0, samples=SEEDS).images for t0 in T0S]
        for column, pictures in enumerate(blocks):
            sheet.paste(block(pictures), (MARGIN + column * side, top))
    sheet.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
