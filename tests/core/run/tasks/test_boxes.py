"""Location tokens to boxes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

from vlmedge.run.tasks.boxes import Box, parse


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


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        ([5] * 15, ()),  # too few
        ([], ()),
        ([5] * 17, (5,) * 16),  # big_vision reads the first 16, whatever follows
        ([5] * 15 + [128], ()),  # no code of PaliGemma's
    ],
)
def test_parse_keeps_a_box_whose_codes_are_no_mask(
    codes: list[int], found: tuple[int, ...]
) -> None:
    """A box stays, with its name and those after it."""
    written = "".join(f"<seg{code:03}>" for code in codes)
    place = "<loc0000><loc0341><loc0682><loc1023>"
    cat, dog = parse(f"{place}{written} a cat ; {place} dog")
    assert cat == Box("a cat", 341 / 1023, 0.0, 1.0, 682 / 1023, codes=found)
    assert dog == Box("dog", 341 / 1023, 0.0, 1.0, 682 / 1023)
    assert cat.mask(30, 20) is None


@pytest.mark.parametrize("text", ["", "no cat here", "<loc0001><loc0002><loc0003> cat"])
def test_parse_passes_over_what_is_no_box(text: str) -> None:
    assert parse(text) == []


def theirs(text: str, kind: str) -> list[dict[str, object]]:
    """What transformers makes of Florence-2's text, in pixels of a picture of 640 x 333."""
    processor = Florence2PostProcessor({kind: {}}, SimpleNamespace(all_special_tokens=[]))
    found: list[dict[str, object]] = processor(text, image_size=(640, 333), parse_tasks=kind)[kind]
    return found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("car<loc_52><loc_332><loc_932><loc_774>wheel<loc_0><loc_1><loc_998><loc_999>", 2),
        ("a cat<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8> dog<loc_9><loc_8>", 2),
        ("cat<loc_1><loc_2><loc_3>dog<loc_1><loc_2><loc_3><loc_4><loc_5>", 1),
        ("no place", 0),
        ("", 0),
    ],
)
def test_parse_reads_boxes_after_names_as_transformers_does(text: str, count: int) -> None:
    ours = parse(text, "boxes")
    assert [
        {"bbox": [int(side) for side in box.pixels(640, 333)], "cat_name": box.label}
        for box in ours
    ] == theirs(text, "description_with_bboxes")
    assert len(ours) == count


def test_parse_reads_boxes_without_names() -> None:
    text = "<loc_1><loc_2><loc_3><loc_4>"
    (box,) = parse(text, "boxes")
    assert box == Box("", 0.0015, 0.0025, 0.0035, 0.0045)
    assert len(theirs(text, "bboxes")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<loc_1><loc_2><loc_30><loc_4><loc_15><loc_60>",
        "<loc_1><loc_2><loc_30><loc_4><loc_15><loc_60><loc_7><sep>"
        "<loc_100><loc_200><loc_300><loc_200><loc_300><loc_400><loc_100><loc_400>",
        "cat<poly><loc_1><loc_2><loc_30><loc_4><loc_15><loc_60></poly>"
        "<poly><loc_100><loc_200><loc_300><loc_200><loc_300><loc_400></poly>",
    ],
)
def test_parse_reads_polygons_as_transformers_does(text: str) -> None:
    ours = parse(text, "polygons")
    flat = [
        [[int(side) for point in outline for side in point] for outline in box.outlines(640, 333)]
        for box in ours
    ]
    assert flat == [thing["polygons"] for thing in theirs(text, "polygons")]
    for box in ours:
        xs, ys = zip(*(point for outline in box.polygons for point in outline), strict=True)
        assert (box.left, box.top, box.right, box.bottom) == (min(xs), min(ys), max(xs), max(ys))


def test_parse_passes_over_what_is_no_polygon() -> None:
    assert parse("<loc_1><loc_2><loc_30><loc_4><sep><loc_5><loc_6>", "polygons") == []
