"""Location tokens to boxes."""

from __future__ import annotations

import pytest

from vlmedge.locations import Box, parse


def test_parse_reads_boxes_in_their_order() -> None:
    text = "<loc0000><loc0341><loc0682><loc1023> cat ; <loc1023><loc0000><loc0000><loc0682> a dog"
    cat, dog = parse(text)
    assert cat == Box("cat", 341 / 1023, 0.0, 1.0, 682 / 1023)
    assert dog == Box("a dog", 0.0, 0.0, 682 / 1023, 1.0)  # corners the wrong way round are turned
    assert cat.pixels(300, 150) == pytest.approx((100, 0, 300, 100))


def test_parse_reads_the_codes_of_a_mask() -> None:
    codes = "".join(f"<seg{i:03}>" for i in range(112, 128))
    (box,) = parse(f"<loc0000><loc0000><loc1023><loc1023>{codes} cat")
    assert box.label == "cat"
    assert box.codes == tuple(range(112, 128))


@pytest.mark.parametrize("text", ["", "no cat here", "<loc0001><loc0002><loc0003> cat"])
def test_parse_passes_over_what_is_no_box(text: str) -> None:
    assert parse(text) == []
