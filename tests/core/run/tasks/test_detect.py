"""Boxes and outlines: how they are drawn, and the command that finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from kit.bundles import bundle_of, checkpoint_of, exported
from kit.command import Run
from kit.tiny import tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.cli.drawing import COLORS, TINT, draw
from vlmedge.errors import CheckpointError, InputError
from vlmedge.make.quantize import quantize
from vlmedge.run.tasks import detect as detecting
from vlmedge.run.tasks.boxes import Box
from vlmedge.run.tasks.context import TaskContext
from vlmedge.shelves.registry import FAMILIES, SCHEMES
from vlmedge.spec import GenerateTask

CODES = (112, 7, 0, 127, 64, 33, 2, 90, 18, 55, 3, 101, 77, 126, 40, 9)
ANSWER = "<loc0100><loc0200><loc0900><loc1000>" + "".join(f"<seg{code:03}>" for code in CODES)
CAT, DOG = Box("cat", 0.1, 0.2, 0.5, 0.9), Box("dog", 0.3, 0.0, 1.0, 0.4)


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random PaliGemma without a decoder of masks; a penalty makes it write locations."""
    folder = tmp_path_factory.mktemp("finder")
    checkpoint_of("paligemma", folder / "checkpoint")
    (folder / "checkpoint" / "vae-oid.npz").unlink()
    config = folder / "checkpoint" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 2.0}))
    return exported(folder / "checkpoint", folder / "bundle")


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random Florence-2; its text is not to repeat itself, so it has many locations."""
    return bundle_of("florence2", tmp_path_factory.mktemp("florence") / "bundle")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a random PaliGemma that answers ANSWER to everything.

    Its layers add nothing, and its head knows what follows each token of it, from the one that
    ends a question to the last.
    """
    folder = tmp_path_factory.mktemp("segmenter")
    checkpoint_of("paligemma", folder / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint")
    file = folder / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "language_model.norm.weight")):
            tensor.zero_()
    table = next(t for name, t in weights.items() if name.endswith("embed_tokens.weight"))
    said = tokenizer(f"\n{ANSWER}</s>", add_special_tokens=False)["input_ids"]
    assert len(set(said)) == len(said) == 1 + 4 + len(CODES) + 1
    head = torch.zeros_like(table)
    head[said[1:]] = torch.nn.functional.normalize(table[said[:-1]], dim=-1)
    weights["lm_head.weight"] = head
    save_file(weights, file, metadata={"format": "pt"})
    return exported(folder / "checkpoint", folder / "bundle")


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


def test_mask_is_what_its_polygons_are_around() -> None:
    square = ((0.25, 0.5), (0.75, 0.5), (0.75, 0.9), (0.25, 0.9))
    corner = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2))
    filled = Box("cat", 0.0, 0.0, 0.75, 0.9, polygons=(square, corner)).mask(80, 40)
    assert filled is not None and filled.shape == (40, 80) and filled.dtype == bool
    assert filled[30, 40] and filled[2, 2]
    assert not (filled[30, 10] or filled[30, 70] or filled[7, 14])


@pytest.mark.parametrize("size", [(200, 100), (57, 333), (1000, 20)])
def test_mask_is_its_raster_resized_to_the_box(size: tuple[int, int]) -> None:
    """Larger and smaller than the raster; the other side is torch."""
    width, height = size
    raster = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    box = Box("cat", 0.25, 0.1, 0.75, 0.8, raster=raster)
    inside = box.mask(width, height)
    assert inside is not None and inside.shape == (height, width)
    left, right, top, bottom = width // 4, int(0.75 * width), height // 10, int(0.8 * height)
    fitted = torch.nn.functional.interpolate(
        torch.from_numpy(raster)[None, None],
        size=(bottom - top, right - left),
        mode="bilinear",
        antialias=True,
    )[0, 0].numpy()
    clear = np.abs(fitted) > 1e-4
    assert (inside[top:bottom, left:right] == (fitted > 0))[clear].all() and clear.mean() > 0.99
    inside[top:bottom, left:right] = False
    assert not inside.any()


def test_mask_of_a_box_without_pixels_is_empty() -> None:
    inside = Box("cat", 0.5, 0.1, 0.5, 0.8, raster=np.ones((64, 64), np.float32)).mask(40, 30)
    assert inside is not None and inside.shape == (30, 40) and not inside.any()


def test_draw_tints_what_a_raster_is_around() -> None:
    raster = np.full((64, 64), -1.0, np.float32)
    raster[:, 32:] = 1.0
    gray = PIL.Image.new("RGB", (200, 100), "gray")
    drawn = draw(gray, [Box("cat", 0.1, 0.2, 0.5, 0.9, raster=raster)])
    assert drawn.getpixel((40, 60)) == gray.getpixel((40, 60)) == drawn.getpixel((150, 60))
    expected = TINT * np.array(color(COLORS[0])) + (1 - TINT) * 128
    np.testing.assert_allclose(drawn.getpixel((80, 60)), expected, atol=1)


@pytest.mark.parametrize(("kind", "tokens"), [("paligemma", 128), ("shikra", 256)])
def test_answers_have_room_for_boxes_unless_the_checkpoint_says_how_long(
    kind: str, tokens: int, tmp_path: Path
) -> None:
    """At most half of the model's positions, of which the tiny PaliGemma has 256."""
    tiny(kind, tmp_path)

    def most() -> int:
        defaults = FAMILIES[kind].open(tmp_path).spec.generation
        assert defaults is not None
        return defaults.max_tokens

    file = next(tmp_path.rglob("generation_config.json"))
    written = json.loads(file.read_text())
    written.pop("max_new_tokens", None)
    file.write_text(json.dumps(written))
    assert most() == tokens
    file.write_text(json.dumps(written | {"max_new_tokens": 7}))
    assert most() == 7


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
    assert ran.code == 1 and "has no task that finds objects: its tasks are caption" in ran.err
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
    with pytest.raises(
        InputError, match="'detect_all' finds every object that it knows: leave 'cat' out"
    ):
        model.detect(pictures[0], "cat", task="detect_all")
    with pytest.raises(InputError, match="nothing to look for: name one thing or several"):
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
    assert again.code == 1 and f"{folder} is not an empty folder: name another" in again.err
    boxes = vlmedge("detect", florence, pictures[2], "cat", "--masks", tmp_path / "none", *long)
    assert boxes.code == 1 and "gives boxes without masks: leave --masks out" in boxes.err
    assert not (tmp_path / "none").exists()
    nowhere = vlmedge("detect", florence, pictures[0], "--masks", tmp_path / "no" / "masks")
    assert nowhere.code == 1 and f"there is no folder {tmp_path / 'no'}: make it" in nowhere.err


def test_detect_gives_the_masks_of_an_answers_codes(segmenter: Path, pictures: list[Path]) -> None:
    model = vlmedge.load(segmenter)
    [box] = model.detect(pictures[0], "cat", task="segment")
    assert box == Box("", 200 / 1023, 100 / 1023, 1000 / 1023, 900 / 1023, codes=CODES)
    assert box.raster is not None
    theirs = big_vision(segmenter.parent / "checkpoint" / "vae-oid.npz", [CODES])[0]
    np.testing.assert_allclose(box.raster, theirs, atol=1e-4 * np.abs(theirs).max())
    inside = box.mask(200, 100)
    assert inside is not None and 0.02 < inside[10:87, 40:195].mean() < 0.98
    [plain] = model.detect(pictures[0], "cat")  # asks for boxes: its codes are passed over
    assert plain.raster is None
    both = model.detect(pictures[:2], "cat", task="segment")
    assert all((other.raster == box.raster).all() for [other] in both)


@pytest.mark.parametrize("scheme", ["float32", *SCHEMES.names()])
def test_mask_decoder_is_big_visions_at_every_scheme(
    segmenter: Path, tmp_path: Path, scheme: str
) -> None:
    """Also of a batch of another size than the one that it was traced at."""
    bundle = segmenter
    if scheme != "float32":
        bundle = quantize(segmenter, scheme, tmp_path / "b", check=False).path
    graph = vlmedge.load(bundle).graphs["mask_decoder"]
    file = segmenter.parent / "checkpoint" / "vae-oid.npz"
    for codes in (np.random.default_rng(1).integers(0, 128, (5, 16)), np.array([CODES])):
        ours, theirs = graph.run({"mask_codes": codes})["mask_logits"], big_vision(file, codes)
        allowed = 0.01 if scheme == "fp16" else 1e-5  # of the largest
        assert np.abs(ours - theirs).max() <= allowed * np.abs(theirs).max()
        assert ((ours > 0) == (theirs > 0)).mean() > 0.995


def big_vision(file: Path, codes: Any) -> NDArray[np.float64]:
    """Decode masks, [batch, 64, 64], as the flax layers of big_vision's evaluator are defined."""
    stored = {name: array.astype(np.float64) for name, array in np.load(file).items()}

    def slide(x: NDArray[np.float64], kernel: NDArray[np.float64], pad: int) -> Any:
        """Correlate [batch, height, width, in] with [height, width, in, out]."""
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        seen = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
        return np.einsum("byxihw,hwio->byxo", seen, kernel, optimize=True)

    def conv(x: Any, name: str, pad: int = 0) -> Any:
        kernel = stored[f"{name}.weight"].transpose(2, 3, 1, 0)
        return slide(x, kernel, pad) + stored[f"{name}.bias"]

    def up(x: Any, name: str) -> Any:
        """Spread by 2, pad by 2, and slide the turned kernel over it (transpose_kernel=True)."""
        batch, height, width, channels = x.shape
        spread = np.zeros((batch, 2 * height - 1, 2 * width - 1, channels))
        spread[:, ::2, ::2] = x
        kernel = stored[f"{name}.weight"].transpose(2, 3, 0, 1)[::-1, ::-1]
        return slide(spread, kernel, 2) + stored[f"{name}.bias"]

    def block(x: Any, name: str) -> Any:
        inner = np.maximum(conv(x, f"{name}.0", 1), 0)
        inner = np.maximum(conv(inner, f"{name}.2", 1), 0)
        return x + conv(inner, f"{name}.4")

    x = stored["_vq_vae._embedding"][np.array(codes)].reshape(-1, 4, 4, 512)
    x = np.maximum(conv(x, "decoder.0"), 0)
    x = block(block(x, "decoder.2.net"), "decoder.3.net")
    for place in (4, 6, 8, 10):
        x = np.maximum(up(x, f"decoder.{place}"), 0)
    found: NDArray[np.float64] = conv(x, "decoder.12")[..., 0]
    return found


def test_command_writes_masks_of_codes(
    segmenter: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run
) -> None:
    folder, out = tmp_path / "masks", tmp_path / "out.png"
    words = "detect", segmenter, pictures[0], "cat", "--masks", folder
    ran = vlmedge(*words, "--task", "segment", "--draw", out, "--json")
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out)
    [row] = shown["boxes"]
    assert row["codes"] == list(CODES) and row["mask"] == str(folder / "0.png")
    with PIL.Image.open(folder / "0.png") as saved, PIL.Image.open(out) as drawn:
        assert (saved.mode, saved.size) == ("L", (shown["width"], shown["height"]))
        inside = np.asarray(saved)
        assert set(np.unique(inside)) == {0, 255} and drawn.size == saved.size
    left, top, right, _ = map(int, row["box"])
    assert not inside[:top].any() and not inside[:, right:].any() and not inside[:, :left].any()
    shutil.rmtree(folder)
    boxes = vlmedge(*words)
    assert boxes.code == 1 and not folder.exists()
    assert "gives boxes without masks: leave --masks out, or give --task segment" in boxes.err


def test_command_says_how_to_get_masks(
    finder: Path, pictures: list[Path], tmp_path: Path, vlmedge: Run
) -> None:
    """Of a checkpoint that came without their decoder; its boxes keep their codes."""
    bundle = Bundle.load(finder)
    names = [component.name for component in bundle.spec.components]
    assert names == ["vision_encoder", "projector", "decoder"]
    segment = ["--task", "segment"]
    ran = vlmedge("detect", bundle.path, pictures[0], "cat", *segment, "--masks", tmp_path / "m")
    refusal = f"{bundle.path} has no decoder for its masks: put vae-oid.npz beside the "
    assert ran.code == 1 and not (tmp_path / "m").exists()
    assert f"{refusal}checkpoint's config.json and export it again" in ran.err
    assert vlmedge("detect", bundle.path, pictures[0], "cat", *segment).code == 0
    context = TaskContext(bundle, {})  # no graph is opened
    task = bundle.spec.tasks["segment"]
    assert isinstance(task, GenerateTask)
    ids = context.tokenizer.ids(ANSWER)
    [box] = detecting.boxes(context, task, "cat", ids, context.open(pictures[0]))
    assert box.codes == CODES and box.raster is None and box.mask(20, 20) is None


def _lacks(arrays: dict[str, Any]) -> None:
    del arrays["decoder.6.bias"]


def _narrow(arrays: dict[str, Any]) -> None:
    arrays["_vq_vae._embedding"] = arrays["_vq_vae._embedding"][:, :32]


def _broken(arrays: dict[str, Any]) -> None:
    arrays["decoder.12.bias"][0] = np.nan


def _pickled(arrays: dict[str, Any]) -> None:
    arrays["decoder.12.bias"] = np.array([None])


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_lacks, r"vae-oid.npz has no 'decoder.6.bias': take the released file"),
        (_narrow, r"'_vq_vae._embedding' is \[128, 32\], PaliGemma's is \[128, 512\]: take the"),
        (_broken, "weight 'mask_decoder.decoder.12.bias' has NaN"),
        (_pickled, "vae-oid.npz cannot be read as arrays: download it again"),
        (None, "vae-oid.npz cannot be read as arrays: download it again"),
    ],
)
def test_wrong_mask_decoders_are_refused(
    segmenter: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None] | None, refusal: str
) -> None:
    folder = Path(shutil.copytree(segmenter.parent / "checkpoint", tmp_path / "wrong"))
    file = folder / "vae-oid.npz"
    if change is None:
        file.write_bytes(b"no archive")
    else:
        with np.load(file) as stored:
            arrays = dict(stored)
        change(arrays)
        np.savez(file, **arrays)
    with pytest.raises(CheckpointError, match=refusal):
        FAMILIES["paligemma"].open(folder).open("mask_decoder")


@pytest.mark.parametrize(
    ("part", "change", "refusal"),
    [
        ("vision_config", {"dim_embed": [16, 32]}, "Microsoft's layout: use the same weights"),
        (
            "text_config",
            {"model_type": "t5"},
            "has the language model 't5': choose a checkpoint with 'bart'",
        ),
        (
            "vision_config",
            {"max_position_embeddings": 3},
            "are 4 x 4 positions, and the model has 3",
        ),
        (None, {"image_token_id": 9999}, "image_token_id is 9999, which its tokenizer does not"),
    ],
)
def test_wrong_florence_configs_are_refused(
    tmp_path: Path, part: str | None, change: dict[str, object], refusal: str
) -> None:
    folder = checkpoint_of("florence2", tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=refusal):
        FAMILIES["florence2"].open(folder)


def test_florence_with_two_embedding_tables_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_of("florence2", tmp_path / "wrong")
    file = folder / "model.safetensors"
    weights = load_file(file)
    shared = "model.language_model.shared.weight"
    copy = "model.language_model.encoder.embed_tokens.weight"
    same, other = weights | {copy: weights[shared] + 0}, weights | {copy: weights[shared] + 1}
    save_file(same, file, metadata={"format": "pt"})
    FAMILIES["florence2"].open(folder)
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="differs from .* encoder and decoder share one table"
    ):
        FAMILIES["florence2"].open(folder)
