"""Boxes and outlines: how they are drawn, and the command that finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny import tiny

import vlmedge
from vlmedge.drawing import COLORS, draw, mask
from vlmedge.errors import CheckpointError, InputError
from vlmedge.exporting import export
from vlmedge.locations import Box
from vlmedge.registry import FAMILIES

CAT, DOG = Box("cat", 0.1, 0.2, 0.5, 0.9), Box("dog", 0.3, 0.0, 1.0, 0.4)


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random PaliGemma; a penalty makes it write locations."""
    folder = tmp_path_factory.mktemp("finder")
    tiny("paligemma", folder / "checkpoint")
    config = folder / "checkpoint" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 2.0}))
    return export(str(folder / "checkpoint"), folder / "bundle", check=False).path


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random Florence-2; its text is not to repeat itself, so it has many locations."""
    folder = tmp_path_factory.mktemp("florence")
    tiny("florence2", folder / "checkpoint")
    return export(str(folder / "checkpoint"), folder / "bundle", check=False).path


def color(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(name[1:]))


def test_draw_puts_lines_where_boxes_are_and_leaves_the_picture_alone() -> None:
    gray = PIL.Image.new("RGB", (200, 100), "gray")
    drawn = draw(gray, [CAT, DOG])
    assert np.unique(np.asarray(gray)).size == 1
    for (x, y), line in {
        (20, 60): COLORS[0],  # left of the cat
        (100, 60): COLORS[0],  # right
        (50, 90): COLORS[0],  # bottom
        (60, 30): COLORS[1],  # left of the dog
        (150, 40): COLORS[1],  # bottom
    }.items():
        assert drawn.getpixel((x, y)) == color(line), (x, y)
    assert drawn.getpixel((60, 60)) == gray.getpixel((60, 60))  # the inside is not filled
    label = np.asarray(drawn.crop((20, 5, 50, 20))).reshape(-1, 3)  # above the cat's corner
    assert list(color(COLORS[0])) in label.tolist() and label.min(axis=1).max() > 150  # on it white


def test_draw_gives_a_label_one_colour() -> None:
    gray = PIL.Image.new("RGB", (200, 200), "gray")
    boxes = [Box("cat", 0.1, 0.5, 0.3, 0.9), DOG, Box("cat", 0.6, 0.5, 0.9, 0.9)]
    drawn = draw(gray, boxes)
    assert drawn.getpixel((20, 150)) == drawn.getpixel((120, 150)) == color(COLORS[0])


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (4000, 3000)])
def test_draw_takes_any_size(size: tuple[int, int]) -> None:
    drawn = draw(PIL.Image.new("RGB", size, "gray"), [CAT, Box("", 0.0, 0.0, 1.0, 1.0)])
    assert drawn.size == size and np.unique(np.asarray(drawn)).size > 1


def test_mask_is_255_inside_of_its_polygons() -> None:
    square = ((0.25, 0.5), (0.75, 0.5), (0.75, 0.9), (0.25, 0.9))
    corner = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2))
    filled = np.asarray(mask(Box("cat", 0.0, 0.0, 0.75, 0.9, polygons=(square, corner)), (80, 40)))
    assert filled.shape == (40, 80) and set(np.unique(filled)) == {0, 255}
    assert filled[30, 40] == filled[2, 2] == 255
    assert filled[30, 10] == filled[30, 70] == filled[7, 14] == 0


def test_detect_finds_boxes_of_several_pictures(finder: Path, pictures: list[Path]) -> None:
    model = vlmedge.load(finder)
    alone = [model.detect(picture, "cat; dog") for picture in pictures]
    assert model.detect(pictures, "cat; dog") == alone
    assert alone == [model.detect(picture, " cat ;dog;") for picture in pictures]
    assert all(alone)


def test_command_draws_and_prints_pixels(
    finder: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run
) -> None:
    out = tmp_path / "out.png"
    out.write_text("what stood there is replaced")
    words = "detect", finder, pictures[0], "cat; dog", "--draw", out
    ran = vlmedge(*words)
    assert ran.code == 0, ran.err
    *lines, last = ran.out.splitlines()
    assert last == str(out)
    shown = json.loads(vlmedge(*words, "--json").out)
    assert shown["drawing"] == str(out) and shown["image"] == str(pictures[0])
    with PIL.Image.open(pictures[0]) as before, PIL.Image.open(out) as after:
        assert after.size == before.size == (shown["width"], shown["height"])
        assert np.asarray(after).tolist() != np.asarray(before.convert("RGB")).tolist()
    rounded = [",".join(f"{side:.0f}" for side in row["box"]) for row in shown["boxes"]]
    assert [line.split(" ")[0] for line in lines] == rounded and lines
    assert vlmedge(*words, "--quiet").out.splitlines() == lines


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--draw", "{tmp}/o.jpg"], "o.jpg: drawings are written as PNG: name a .png file"),
        (["--draw", "{tmp}/no/o.png"], "there is no folder {tmp}/no: make it"),
        (["--draw", "{picture}"], "is the picture that is looked at: name another file"),
        (["--task", "ask"], "task 'ask' answers in words: use ask, or detect or segment"),
        (["--task", "find"], "no task 'find'"),
    ],
)
def test_command_refuses_in_one_line(
    finder: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run, words: list[str], refusal: str
) -> None:
    before = pictures[0].read_bytes()
    names = {"tmp": tmp_path, "picture": pictures[0]}
    ran = vlmedge("detect", finder, pictures[0], "cat", *(word.format(**names) for word in words))
    *warned, last = ran.err.splitlines()
    assert ran.code == 1 and refusal.format(**names) in last
    assert all("is unverified" in line for line in warned)
    assert not list(tmp_path.iterdir()) and pictures[0].read_bytes() == before


def test_command_refuses_a_bundle_that_locates_nothing(
    blip2_bundle: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run
) -> None:
    ran = vlmedge("detect", blip2_bundle, pictures[0], "cat", "--draw", tmp_path / "o.png")
    assert ran.code == 1 and "says of nothing where it is: its tasks are caption" in ran.err
    assert not list(tmp_path.iterdir())


def test_florence_finds_one_thing_after_the_other_or_all(
    florence: Path, pictures: list[Path]
) -> None:
    model = vlmedge.load(florence)
    cat, dog = (model.detect(pictures[2], what, max_tokens=40) for what in ("cat", "dog"))
    assert model.detect(pictures[2], "cat; dog", max_tokens=40) == cat + dog
    every = [model.detect(picture, max_tokens=40) for picture in pictures]
    assert model.detect(pictures, task="detect_all", max_tokens=40) == every
    assert cat and any(every)
    outlined = model.detect(pictures[2], "cat", task="segment", max_tokens=40)
    assert outlined and all(box.polygons for box in outlined)
    words = {model.caption(pictures[0], task=task) for task in ("caption", "more_detailed_caption")}
    assert len(words) == 2
    with pytest.raises(InputError, match="'detect_all' finds all that it knows: leave 'cat' out"):
        model.detect(pictures[0], "cat", task="detect_all")
    with pytest.raises(InputError, match="nothing to look for: name it"):
        model.detect(pictures[0], task="ground")


def test_command_writes_masks(
    florence: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run
) -> None:
    folder, out = tmp_path / "masks", tmp_path / "out.png"
    long = "--max-tokens", 40
    words = "detect", florence, pictures[2], "cat", "--task", "segment", "--masks", folder, *long
    ran = vlmedge(*words, "--draw", out, "--json")
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out)
    assert shown["boxes"] and all(row["polygons"] for row in shown["boxes"])
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i}.png" for i in range(len(shown["boxes"]))]
    for file in files:
        with PIL.Image.open(file) as saved:
            assert (saved.mode, saved.size) == ("L", (shown["width"], shown["height"]))
            assert 255 in np.asarray(saved)
    again = vlmedge(*words)
    assert again.code == 1 and f"{folder} is no empty folder: name another" in again.err
    boxes = vlmedge("detect", florence, pictures[2], "cat", "--masks", tmp_path / "none", *long)
    assert boxes.code == 1 and "its boxes have no outlines: leave --masks out" in boxes.err
    assert not (tmp_path / "none").exists()
    nowhere = vlmedge("detect", florence, pictures[0], "--masks", tmp_path / "no" / "masks")
    assert nowhere.code == 1 and f"there is no folder {tmp_path / 'no'}: make it" in nowhere.err


@pytest.mark.parametrize(
    ("part", "change", "refusal"),
    [
        ("vision_config", {"dim_embed": [16, 32]}, "Microsoft's own layout: use the same weights"),
        ("text_config", {"model_type": "t5"}, "has a language model 't5': allowed: bart"),
        ("vision_config", {"max_position_embeddings": 3}, "are 4 x 4 places, the model knows 3"),
        (None, {"image_token_id": 9999}, "image_token_id is 9999, which its tokenizer does not"),
    ],
)
def test_wrong_florence_configs_are_refused(
    florence: Path, tmp_path: Path, part: str | None, change: dict[str, object], refusal: str
) -> None:
    folder = Path(shutil.copytree(florence.parent / "checkpoint", tmp_path / "wrong"))
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=refusal):
        FAMILIES["florence2"].open(folder)


def test_florence_with_two_embedding_tables_is_refused(florence: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(florence.parent / "checkpoint", tmp_path / "wrong"))
    file = folder / "model.safetensors"
    weights = load_file(file)
    shared = "model.language_model.shared.weight"
    copy = "model.language_model.encoder.embed_tokens.weight"
    same, other = weights | {copy: weights[shared] + 0}, weights | {copy: weights[shared] + 1}
    save_file(same, file, metadata={"format": "pt"})
    FAMILIES["florence2"].open(folder)
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differs from .* both sides share one table"):
        FAMILIES["florence2"].open(folder)
