"""One self-contained HTML page: no script, font or picture is fetched from anywhere."""

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdedit.image import Pixels

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #6e7781; --line: #d8dee4; --paper: #fff; --tint: #f6f8fa; --accent: #1f6fb2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --paper: #0d1117; --tint: #161b22; --accent: #58a6ff }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .5rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.wide { overflow-x: auto }
img { display: block; image-rendering: pixelated; background: var(--tint) }
code { font-size: .875em; overflow-wrap: anywhere }
"""  # noqa: E501


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole document. body, style, script: as they are; title: escaped."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def data_url(pixels: "Pixels") -> str:
    """(H, W, C) uint8 as a PNG that carries no record: nothing in it tells where it came from."""
    from sdedit.image import to_image

    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
