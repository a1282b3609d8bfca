"""Paintings: what examples may be, what is refused, and a checkpoint in its authors' own file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.bundles import bundle_of, checkpoint_of
from kit.command import Run
from PIL import Image
from safetensors.torch import load_file

import vlmedge
from vlmedge.errors import CheckpointError, InputError
from vlmedge.run.inputs.image_files import load_painting
from vlmedge.run.inputs.interpolate import interpolate
from vlmedge.run.tasks.paint import palette, peaks
from vlmedge.shelves.registry import FAMILIES

PICTURE = np.arange(30 * 41 * 3, dtype=np.uint8).reshape(30, 41, 3)
NUMBERS = np.arange(20, dtype=np.uint8).reshape(4, 5) % 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter") / "checkpoint"
    return checkpoint_of("painter", folder)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> vlmedge.Model:
    return vlmedge.load(bundle_of("painter", checkpoint.parent / "bundle"))


@pytest.mark.parametrize("size", [(40, 61), (9, 11), (17, 5), (1, 1)])
@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic"])
def test_interpolate_is_torchs(size: tuple[int, int], kind: Any) -> None:
    planes = np.random.default_rng(0).standard_normal((3, 17, 23)).astype(np.float32)
    exact = {} if kind == "nearest" else {"align_corners": False}
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(planes)[None], size=size, mode=kind, **exact
    )
    np.testing.assert_allclose(interpolate(planes, size, kind), theirs[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("P", "P"), ("L", "L"), ("I;16", "I;16"), ("RGBA", "RGB"), ("1", "L"), ("LA", "L")],
)
def test_paintings_keep_their_numbers(mode: str, kept: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    gray = Image.fromarray(NUMBERS)
    (gray.convert("I").convert("I;16") if mode == "I;16" else gray.convert(mode)).save(file)
    found = load_painting(file)
    assert found.mode == kept
    if mode in ("L", "I;16"):
        np.testing.assert_array_equal(np.asarray(found), NUMBERS)


def test_numbers_are_the_palettes_colours(model: vlmedge.Model) -> None:
    """Labels as numbers, and the same as colours, give one painting."""
    colors = np.array(palette(7), np.uint8)[NUMBERS]
    one, other = (
        model.paint(PICTURE, [(PICTURE, painting)], task="segment", labels=7)
        for painting in (NUMBERS, colors)
    )
    np.testing.assert_array_equal(one.values, other.values)


def test_depth_takes_millimetres_and_gives_metres(model: vlmedge.Model) -> None:
    """5 m of 10 are 127 of 255."""
    deep, gray = np.full((4, 5), 5000, np.uint16), np.full((4, 5), 127, np.uint8)
    one, other = (
        model.paint(PICTURE, [(PICTURE, painting)], task="depth") for painting in (deep, gray)
    )
    assert one.values is not None and other.values is not None
    np.testing.assert_array_equal(one.values, other.values)
    assert one.values.shape == (30, 41) and 0 <= one.values.min() < one.values.max() <= 10


def test_points_are_maps_with_a_top_each(model: vlmedge.Model) -> None:
    found = model.paint(PICTURE, [(PICTURE, PICTURE)], task="keypoints")
    assert found.values is not None and found.values.shape == (17, 30, 41)
    tops = peaks(found.values)  # type: ignore[arg-type]
    assert all(found.values[i, y, x] == high for i, (x, y, high) in enumerate(tops))


@pytest.mark.parametrize(
    ("painting", "options", "match"),
    [
        (PICTURE, {"task": "depth", "labels": 3}, "labels: this task paints no labels"),
        (PICTURE, {"task": "segment", "labels": 300}, "labels is 300: it must be 1 to 255"),
        (NUMBERS, {"task": "segment", "labels": 6}, "has label 7, labels is 6: number them from 0"),
        (NUMBERS.astype(np.uint16), {}, "has 16 bits: give 8, only a depth map may have 16"),
        (NUMBERS.astype(np.float32), {}, "image array of float32: give uint8"),
    ],
)
def test_wrong_examples_are_refused(
    model: vlmedge.Model, painting: Any, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        model.paint(PICTURE, [(PICTURE, painting)], **options)


def test_nothing_is_refused(model: vlmedge.Model) -> None:
    with pytest.raises(InputError, match="no examples: give at least one picture"):
        model.paint(PICTURE, [])
    with pytest.raises(InputError, match="no images: give at least one"):
        model.paint([], [(PICTURE, PICTURE)])


def test_authors_own_file_is_read_when_trusted(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "authors"
    shutil.copytree(checkpoint, folder)
    state = {"model": load_file(folder / "model.safetensors")}
    torch.save(state, folder / "painter_vit_large.pth")
    (folder / "model.safetensors").unlink()
    family = FAMILIES["painter"]
    with pytest.raises(CheckpointError, match=r"pickle file \(painter_vit_large.pth\)"):
        family.open(folder)
    theirs: Any = family.open(folder, allow_pickle=True)
    ours: Any = family.open(checkpoint)
    assert theirs.weights.shapes() == ours.weights.shapes()
    for name in ours.weights.shapes():
        np.testing.assert_array_equal(theirs.weights.read(name), ours.weights.read(name))


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("config.json", '{"architectures": ["Painter"], "hidden_size": "big"}', "is refused"),
        ("preprocessor_config.json", '{"size": {"height": 48, "width": 32}}', "made 32 x 48"),
    ],
)
def test_wrong_configs_are_refused(
    checkpoint: Path, tmp_path: Path, file: str, text: str, match: str
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(checkpoint, folder)
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        FAMILIES["painter"].open(folder)


def test_command_writes_labels_as_an_indexed_picture_of_the_same_size(
    model: vlmedge.Model, tmp_path: Path, vlmedge: Run
) -> None:
    picture, numbers, out = (tmp_path / f"{name}.png" for name in ("picture", "numbers", "out"))
    Image.fromarray(PICTURE).save(picture)
    Image.fromarray(NUMBERS).save(numbers)
    words = model.bundle.path, picture, "--example", f"{picture}={numbers}", "--out", out
    ran = vlmedge("paint", *words, "--task", "segment", "--labels", "7")
    assert (ran.code, ran.out.strip()) == (0, str(out)), ran.err
    with Image.open(out) as saved:
        assert (saved.mode, saved.size) == ("P", (41, 30))
        expected = model.paint(PICTURE, [(PICTURE, NUMBERS)], task="segment", labels=7).values
        np.testing.assert_array_equal(np.asarray(saved), expected)
    assert vlmedge("paint", *words, "--quiet").code == 0
    with Image.open(out) as saved:
        assert (saved.mode, saved.size) == ("RGB", (41, 30))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--example", "a.png", "--out", "o.png"], "--example a.png: give PICTURE=PAINTING"),
        (["--example", "a.png=b.png", "--out", "o.jpg"], "o.jpg: paintings are written as PNG"),
        (["--example", "a.png=b.png", "--out", "o.png"], "no file b.png"),
    ],
)
def test_command_refuses_in_one_line(
    model: vlmedge.Model, vlmedge: Run, words: list[str], message: str
) -> None:
    ran = vlmedge("paint", model.bundle.path, "b.png", *words)
    assert ran.code == 1 and message in ran.err
