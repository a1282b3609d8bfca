"""Contact sheets and pictures for terminals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from vlmedge.cli import contact_sheet as sheet
from vlmedge.cli.contact_sheet import contact_sheet, terminal_picture

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)


def test_sheet_holds_every_picture_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / "sheet.png"
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pairs = [(Image.new("RGB", (64, 64), color), "a caption") for color in colors]
    contact_sheet(pairs, file, columns=2)
    with Image.open(file) as image:
        drawn = image.convert("RGB")
    card = sheet.CELL_PX + 2 * sheet.PADDING_PX + sheet.GAP_PX
    middle = sheet.GAP_PX + sheet.PADDING_PX + sheet.CELL_PX // 2
    assert drawn.getpixel((middle, middle)) == colors[0]
    assert drawn.getpixel((middle + card, middle)) == colors[1]
    assert drawn.size[0] == sheet.GAP_PX + 2 * card
    assert drawn.getpixel((middle + card, drawn.size[1] - middle // 2)) == sheet.PAPER


def test_sheet_grows_with_its_captions(tmp_path: Path) -> None:
    short, long = tmp_path / "short.png", tmp_path / "long.png"
    contact_sheet([(RED, "red")], short)
    contact_sheet([(RED, "red " * 60)], long)
    with Image.open(short) as small, Image.open(long) as tall:
        assert tall.height > small.height and tall.width == small.width


def test_sheet_takes_any_shape_and_mode(tmp_path: Path) -> None:
    pictures = [Image.new("L", (300, 10)), Image.new("RGBA", (10, 300)), Image.new("P", (1, 1))]
    contact_sheet([(picture, "") for picture in pictures], tmp_path / "sheet.png")


def test_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give at least one"):
        contact_sheet([], tmp_path / "sheet.png")


@pytest.mark.parametrize("text", ["a small red circle " * 9, "x" * 200, "", "one\n\ntwo", "W 猫"])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    font = ImageFont.load_default(17)
    lines = sheet._wrapped(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_line_break_in_a_text_stays() -> None:
    assert sheet._wrapped("one\n\ntwo", ImageFont.load_default(17), 200) == ["one", "", "two"]


def test_terminal_picture_has_two_pixels_a_character() -> None:
    picture = np.zeros((4, 2, 3), np.uint8)
    picture[0], picture[1] = (1, 2, 3), (4, 5, 6)
    lines = terminal_picture(picture, 2).split("\n")
    assert len(lines) == 2
    assert lines[0] == "\x1b[38;2;1;2;3;48;2;4;5;6m▀" * 2 + "\x1b[0m"


@pytest.mark.parametrize("size", [(64, 64), (100, 30), (1, 1), (500, 1)])
def test_terminal_picture_is_a_rectangle(size: tuple[int, int]) -> None:
    lines = terminal_picture(Image.new("RGB", size), 20).split("\n")
    assert {len(re.sub("\x1b\\[[0-9;]*m", "", line)) for line in lines} == {20}
