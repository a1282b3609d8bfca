"""Places in plain figures: boxes of pictures that were filled up to squares, out and in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
from kit.bundles import bundle_of
from kit.command import Run
from transformers import CLIPImageProcessor

import vlmedge as package
from vlmedge.errors import InputError
from vlmedge.run.inputs.image import preprocess
from vlmedge.run.inputs.letterbox import squared
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks.boxes import Box, into_square, out_of_square, parse
from vlmedge.run.tasks.regions import check_regions, placed
from vlmedge.spec import GenerateTask, ImageFrontEnd

FRONT = ImageFrontEnd(
    "shortest_edge", (32, 32), "bicubic", (32, 32), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
)
WHITE = msgspec.structs.replace(FRONT, square=(255, 255, 255))
POINTS = GenerateTask((), "soft_prompt", "decoder", "{question}", regions="brackets")
SIZES = [(90, 40), (40, 91), (33, 33), (1, 200), (7, 6)]


@pytest.fixture(scope="module")
def shikra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("shikra", tmp_path_factory.mktemp("shikra") / "bundle")


def noise(width: int, height: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_picture_is_in_the_middle_of_its_square(size: tuple[int, int]) -> None:
    picture, side = noise(*size), max(size)
    filled = np.asarray(squared(picture, (255, 0, 9)))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    inside = filled[top : top + size[1], left : left + size[0]]
    np.testing.assert_array_equal(inside, np.asarray(picture))
    around = np.ones((side, side), bool)
    around[top : top + size[1], left : left + size[0]] = False
    assert filled.shape == (side, side, 3) and (filled[around] == (255, 0, 9)).all()


@pytest.mark.parametrize("size", SIZES)
def test_square_comes_before_the_resize(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=FRONT.image_mean,
        image_std=FRONT.image_std,
    )
    picture = noise(*size)
    theirs = processor(squared(picture, (255, 255, 255)), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess([picture], WHITE), theirs, atol=1e-6)
    if len(set(size)) > 1:
        other = preprocess([picture], FRONT) if size != (1, 200) else 0 * theirs
        assert np.abs(other - theirs).max() > 0.1


def test_square_that_is_too_large_is_refused() -> None:
    with pytest.raises(InputError, match=r"14000 x 2 pixels, in a square, has 14000 x 14000"):
        preprocess([PIL.Image.new("RGB", (14000, 2))], WHITE)


@pytest.mark.parametrize("size", SIZES)
def test_places_go_into_the_square_and_out_again(size: tuple[int, int]) -> None:
    width, height = size
    region = (0.25 * width, 0.5 * height, 0.75 * width, height)
    x0, y0, x1, y1 = into_square(region, size)
    found = out_of_square(Box("cat", x0, y0, x1, y1), size)
    assert found is not None and found.label == "cat"
    assert (found.left, found.top, found.right, found.bottom) == pytest.approx((0.25, 0.5, 0.75, 1))
    # by hand: the square of 100 x 50 has 25 rows above the picture
    assert into_square((10, 20, 100, 50), (100, 50)) == [0.1, 0.45, 1.0, 0.75]


def test_box_is_cut_off_where_the_picture_ends() -> None:
    found = out_of_square(Box("", 0.1, 0.0, 0.9, 0.5), (100, 50))
    assert found is not None
    assert found.pixels(100, 50) == pytest.approx((10, 0, 90, 25))
    assert out_of_square(Box("", 0.1, 0.0, 0.9, 0.2), (100, 50)) is None
    assert out_of_square(Box("", 0.8, 0.1, 0.9, 0.9), (50, 100)) is None


def test_parse_reads_brackets_after_the_words_that_they_belong_to() -> None:
    text = (
        "It is noon. A man [0.220,0.066,0.845,0.888] with two dogs"
        "[0.100,0.200,0.300,0.400;0.500,0.9,1.000,0.600], one asleep. [0.1,0.2] [1,2,3]"
    )
    man, *dogs = parse(text, "brackets")
    assert man == Box("A man", 0.22, 0.066, 0.845, 0.888)
    # corners the wrong way round are turned
    assert dogs == [
        Box("with two dogs", 0.1, 0.2, 0.3, 0.4),
        Box("with two dogs", 0.5, 0.6, 1.0, 0.9),
    ]
    assert parse("Answer: [0.1,0.2,0.3,5.0] .", "brackets") == [Box("Answer", 0.1, 0.2, 0.3, 1.0)]
    assert parse("[0.1,0.2,0.3] [a,b,c,d] [0.1, 0.2, 0.3, 0.4]", "brackets") == []


def test_regions_are_written_where_the_question_has_their_places() -> None:
    regions = [(10, 20, 100, 50), (50, 25)]
    question = "Is {region} at {region}?"
    check_regions(POINTS, question, regions)
    found = placed(question, regions, (100, 50), WHITE)
    assert found == "Is [0.100,0.450,1.000,0.750] at [0.500,0.500]?"
    # without a square, in parts of the picture's own sides
    found = placed(question, regions, (100, 50), FRONT)
    assert found == "Is [0.100,0.400,1.000,1.000] at [0.500,0.500]?"
    # what is said and what is written are one
    (box,) = parse(placed("{region}", [(3, 4, 61, 40)], (90, 40), WHITE), "brackets")
    back = out_of_square(box, (90, 40))
    assert back is not None and back.pixels(90, 40) == pytest.approx((3, 4, 61, 40), abs=0.05)


@pytest.mark.parametrize(
    ("question", "regions", "refusal"),
    [
        ("what?", [(1, 2, 3, 4)], r"0 marks \{region\} for 1 regions: put a \{region\}"),
        ("{region}?", [], r"1 marks \{region\} for 0 regions"),
        ("{region}?", [(1, 2, 3)], "region 1,2,3: give left, top, right and bottom, or x and y"),
        ("{region}?", [(1, float("nan"))], "region 1,nan: give left"),
        ("{region}?", [(3, 2, 3, 4)], "region 3,2,3,4: left must be below right"),
        ("{region}?", [(1, 5, 3, 4)], "and top below bottom"),
    ],
)
def test_wrong_regions_are_refused(question: str, regions: list[Any], refusal: str) -> None:
    with pytest.raises(InputError, match=refusal):
        check_regions(POINTS, question, regions)


def test_region_beside_the_picture_is_refused() -> None:
    for region in ((101, 2, 110, 4), (-9, 2, -1, 4), (3, 51)):
        with pytest.raises(InputError, match="is beside the picture of 100 x 50 pixels: count"):
            placed("{region}", [region], (100, 50), WHITE)


def test_model_without_regions_refuses_them(
    blip2_bundle: Path, pictures: list[Path], vlmedge: Run
) -> None:
    ran = vlmedge("ask", blip2_bundle, pictures[0], "what {region}?", "--region", "1,2,3,4")
    assert ran.code == 1 and "takes no regions: say in words where to look" in ran.err
    assert vlmedge("ask", blip2_bundle, pictures[0], "what {region}?", "--max-tokens", 2).code == 0


def test_question_may_point_at_the_picture(shikra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of each picture has the region in its own square's figures."""
    model, wide, high = package.load(shikra), noise(100, 50), noise(50, 100)
    asked: list[str] = []
    write = generating.write

    def spy(parts: Any, task: Any, soft: Any, texts: list[str], *rest: Any, **more: Any) -> Any:
        asked.extend(texts)
        return write(parts, task, soft, texts, *rest, **more)

    monkeypatch.setattr(generating, "write", spy)
    question, region = "what is {region}?", (10, 20, 30, 40)
    ours = model.ask([wide, high], question, regions=[region], max_tokens=8)
    written = "what is [0.100,0.450,0.300,0.650]?", "what is [0.350,0.200,0.550,0.400]?"
    assert [text.split("<im_end> ")[1] for text in asked] == [f"{t} ASSISTANT:" for t in written]
    assert ours[0] != ours[1]
    pieces = model.stream(wide, question=question, regions=[region], max_tokens=8)
    assert "".join(pieces).strip() == ours[0] == model.ask(wide, written[0], max_tokens=8)


def test_boxes_are_in_the_picture_s_own_pixels(
    shikra: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes no figures, so it is told what to write; all after it is real."""
    model, wide, high = package.load(shikra), noise(100, 50), noise(50, 100)
    text = "Answer: [0.100,0.450,0.300,0.650] ."

    def write(parts: Any, task: Any, soft: Any, texts: list[str], *_: Any, **more: Any) -> Any:
        return [parts.tokenizer.ids(text, whole=False) for _ in texts]

    monkeypatch.setattr(generating, "write", write)
    (seen,), (tall,) = model.detect([wide, high], "the cat")
    assert seen.label == tall.label == "the cat"
    assert seen.pixels(100, 50) == pytest.approx((10, 20, 30, 40))
    assert tall.pixels(50, 100) == pytest.approx((0, 45, 5, 65))
    cat, dog = model.detect(wide, "cat; dog")
    assert (cat.label, dog.label) == ("cat", "dog") and cat.pixels(9, 9) == dog.pixels(9, 9)
    (every,) = model.detect(wide)
    assert every.label == "Answer" and every.pixels(9, 9) == seen.pixels(9, 9)


def test_command_takes_regions(shikra: Path, tmp_path: Path, vlmedge: Run) -> None:
    file = tmp_path / "wide.png"
    noise(100, 50).save(file)
    words = "ask", shikra, file, "what is {region}?", "--max-tokens", 6, "--json"
    shown = json.loads(vlmedge(*words, "--region", "10,20,30,40").out)
    model = package.load(shikra)
    assert shown["answer"] == model.ask(file, words[3], regions=[(10, 20, 30, 40)], max_tokens=6)
    for region, refusal in {
        "a,b": "--region a,b: give X0,Y0,X1,Y1, or a point X,Y, in pixels",
        "200,1": "region 200,1 is beside the picture of 100 x 50 pixels",
    }.items():
        ran = vlmedge(*words, "--region", region)
        assert ran.code == 1 and refusal in ran.err.splitlines()[-1]
