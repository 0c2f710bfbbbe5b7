"""Contact sheets: labelled rows and columns of pictures, all with the same look."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sdedit.errors import ImageError, OptionError

Cell = Image.Image | Sequence[Image.Image] | None

LEAST, MOST = 128, 256  # the longer side of a picture on a sheet: small ones are enlarged in whole pixels
GAP, BETWEEN = 6, 12  # between the pictures of a cell, and between cells
TEXT, LEAST_TEXT = 18, 11
INK, PAPER = (30, 30, 30), (255, 255, 255)


def contact_sheet(cells: Sequence[Sequence[Cell]], *, columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """A sheet of pictures: RGB. Small pictures are enlarged without smoothing, so that their pixels can be judged.

    cells: row by row; a cell is a picture, several pictures (laid out in a square), or None. The first picture of the
    last column gives the proportions. columns, rows: their labels, of one or more lines. Raises OptionError for
    labels that are not one a column and one a row, ImageError where there is no picture.
    """
    if len(cells) != len(rows) or {len(row) for row in cells} != {len(columns)}:
        raise OptionError(
            f"a sheet of {len(rows)} rows and {len(columns)} columns has cells {[len(row) for row in cells]}",
            hint="one cell for each column in every row",
        )
    filled = [[_pictures(cell) for cell in row] for row in cells]
    model = next((pictures[0] for row in filled for pictures in reversed(row) if pictures), None)
    if model is None:
        raise ImageError("a sheet without a picture", hint="give at least one")
    across = max(math.ceil(math.sqrt(len(pictures))) for row in filled for pictures in row)
    tile = _tile(model.size)
    width, height = (across * side + (across - 1) * GAP for side in tile)

    def lines(labels: Sequence[str]) -> int:
        return max(label.count("\n") + 1 for label in labels)

    left, top = (round(1.3 * TEXT * lines(labels)) + GAP for labels in (rows, columns))
    size = left + len(columns) * (width + BETWEEN), top + len(rows) * (height + BETWEEN)
    sheet = Image.new("RGB", size, PAPER)
    for column, label in enumerate(columns):
        sheet.paste(_label(label, (width, top)), (left + column * (width + BETWEEN), 0))
    for row, label in enumerate(rows):
        upright = _label(label, (height, left)).rotate(90, expand=True)
        sheet.paste(upright, (0, top + row * (height + BETWEEN)))
        for column, pictures in enumerate(filled[row]):
            corner = left + column * (width + BETWEEN), top + row * (height + BETWEEN)
            box = (width, height) if len(pictures) == 1 else tile
            for number, picture in enumerate(pictures):
                down, right = divmod(number, across)
                place = corner[0] + right * (tile[0] + GAP), corner[1] + down * (tile[1] + GAP)
                sheet.paste(_fitted(picture, box), place)
    return sheet


def _pictures(cell: Cell) -> list[Image.Image]:
    return [] if cell is None else [cell] if isinstance(cell, Image.Image) else list(cell)


def _tile(size: tuple[int, int]) -> tuple[int, int]:
    """The size of one picture on the sheet: a whole multiple of a small one's, or that of a large one made smaller."""
    longer = max(size)
    scale = math.ceil(LEAST / longer) if longer <= MOST else MOST / longer
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def _fitted(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """The picture as large as the box lets it."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    sampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, sampling)


def _label(text: str, box: tuple[int, int]) -> Image.Image:
    """Centred lines of text; smaller, and then cut off, where they are too wide for the box."""
    drawn = Image.new("RGB", box, PAPER)
    draw = ImageDraw.Draw(drawn)

    def width(text: str, size: int) -> float:
        return float(draw.multiline_textbbox((0, 0), text, ImageFont.load_default(size))[2])

    size = next((size for size in range(TEXT, LEAST_TEXT, -1) if width(text, size) <= box[0]), LEAST_TEXT)
    while width(text, size) > box[0] and len(text) > 1:
        text = f"{text.removesuffix('…')[:-1]}…"
    middle = box[0] / 2, box[1] / 2
    draw.multiline_text(middle, text, INK, ImageFont.load_default(size), anchor="mm", align="center")
    return drawn
