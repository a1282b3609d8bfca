"""Pictures with their captions: one PNG, or coloured characters for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image | NDArray[np.uint8]

CELL_PX = 240  # side of a picture on the sheet
GAP_PX = 22
PADDING_PX = 14  # between a card's edge and what is in it
FONT_PX = 17
LINE_PX = 24

PAPER = (244, 245, 247)
CARD = (255, 255, 255)
EDGE = (217, 221, 227)
INK = (33, 37, 45)

_UPPER_HALF = "\u2580"  # its foreground is the upper pixel, its background the lower
_RESET = "\x1b[0m"


def contact_sheet(pairs: Sequence[tuple[Picture, str]], file: Path, columns: int = 4) -> None:
    """Draw cards, each a picture with its text under it, and save them as one PNG.

    Args:
        pairs: Pictures, RGB or uint8 [height, width, 3], and texts; a line break in a text stays.
        file: Where to.
        columns: Cards in a row.
    """
    if not pairs or columns < 1:
        raise ValueError(f"{len(pairs)} pictures in {columns} columns: give at least one")
    columns = min(columns, len(pairs))
    font = ImageFont.load_default(FONT_PX)
    texts = [_wrapped(text, font, CELL_PX) for _, text in pairs]
    rows = range(0, len(pairs), columns)
    heights = [_card_height(texts[start : start + columns]) for start in rows]
    card_width = CELL_PX + 2 * PADDING_PX
    width = GAP_PX + columns * (card_width + GAP_PX)
    sheet = Image.new("RGB", (width, GAP_PX + sum(h + GAP_PX for h in heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP_PX
    for start, height in zip(rows, heights, strict=True):
        for column, (picture, _) in enumerate(pairs[start : start + columns]):
            left = GAP_PX + column * (card_width + GAP_PX)
            box = (left, top, left + card_width - 1, top + height - 1)
            draw.rounded_rectangle(box, radius=10, fill=CARD, outline=EDGE)
            sheet.paste(_fitted(picture), (left + PADDING_PX, top + PADDING_PX))
            y = top + PADDING_PX + CELL_PX + PADDING_PX // 2
            for line in texts[start + column]:
                draw.text((left + PADDING_PX, y), line, fill=INK, font=font)
                y += LINE_PX
        top += height + GAP_PX
    sheet.save(file, format="PNG", optimize=True)


def terminal_picture(image: Picture, width_cells: int) -> str:
    """Draw a picture with half blocks in 24-bit colours: two pixels a character.

    Args:
        image: RGB, or uint8 [height, width, 3].
        width_cells: Characters in a line.

    Returns:
        Lines of equal width; each ends with the colours reset.
    """
    picture = _image(image)
    height = max(2, 2 * round(picture.height * width_cells / picture.width / 2))
    small = picture.resize((width_cells, height), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(height // 2, 2, width_cells, 3)
    return "\n".join(_line(upper, lower) for upper, lower in pixels)


def _line(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> str:
    cells = [
        f"\x1b[38;2;{_color(above)};48;2;{_color(below)}m{_UPPER_HALF}"
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True)
    ]
    return "".join(cells) + _RESET


def _color(rgb: list[int]) -> str:
    return ";".join(map(str, rgb))


def _image(picture: Picture) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.convert("RGB")


def _fitted(picture: Picture) -> Image.Image:
    """Scale a picture into its square; a small one keeps its pixels' edges soft, not blocky."""
    image = _image(picture)
    scale = CELL_PX / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (CELL_PX, CELL_PX), CARD)
    square.paste(scaled, ((CELL_PX - size[0]) // 2, (CELL_PX - size[1]) // 2))
    return square


def _card_height(texts: Sequence[Sequence[str]]) -> int:
    lines = max(len(text) for text in texts)
    return 2 * PADDING_PX + CELL_PX + PADDING_PX // 2 + lines * LINE_PX


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Break a text into lines of at most `width` pixels; a word that is longer is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                sizes = range(len(word) - 1, 1, -1)
                fits = next((n for n in sizes if font.getlength(word[:n]) <= width), 1)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines
