"""A folder of pictures, indexed once and searched by texts and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kit.bundles import bundle_of
from PIL import Image

import vlmedge as package
from vlmedge.checkpoints.scenes import CLASSES, draw_labelled
from vlmedge.errors import InputError
from vlmedge.run.tasks.retrieve import Index, load_index, recall_at


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save pictures of one shape each, one in a folder inside, and a broken one."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "inside").mkdir()
    for i in range(11):
        image, label = draw_labelled(i, "heldout")
        name = f"{i:02d}-{CLASSES[label].replace(' ', '-')}.png"
        Image.fromarray(image).save(folder / ("inside" if i == 3 else "") / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def model(clip_bundle: Path) -> package.Model:
    return package.load(clip_bundle)


@pytest.fixture(scope="module")
def index(model: package.Model, gallery: Path) -> Index:
    return model.index(gallery)


def test_every_readable_picture_is_in_the_index(model: package.Model, gallery: Path) -> None:
    notes: list[str] = []
    index = model.index(gallery, notes.append)
    assert len(index.paths) == len(index.vectors) == 11
    assert sum(path.startswith("inside/") for path in index.paths) == 1
    assert len(notes) == 1 and "broken.png" in notes[0]
    for path, vector in zip(index.paths, index.vectors, strict=True):
        np.testing.assert_allclose(vector, model.embed_image(gallery / path), atol=1e-5)


def test_text_finds_its_picture(model: package.Model, index: Index) -> None:
    names = [Path(path).stem[3:].replace("-", " ") for path in index.paths]
    texts = [f"a photo of a {name}" for name in names]
    hits = [model.search(index, text, top=1)[0][0] for text in texts]
    assert sum(a == b for a, b in zip(hits, index.paths, strict=True)) >= 9  # a trained CLIP


def test_picture_finds_itself(model: package.Model, gallery: Path, index: Index) -> None:
    path, cosine = model.search(index, image=gallery / index.paths[4], top=1)[0]
    assert (path, cosine) == (index.paths[4], pytest.approx(1.0, abs=1e-5))


def test_index_comes_back_from_disk(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index.npz")
    back = load_index(tmp_path / "index.npz")
    np.testing.assert_array_equal(back.vectors, index.vectors)
    assert (back.paths, back.folder, back.checkpoint) == (
        index.paths,
        index.folder,
        index.checkpoint,
    )


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*missing\.npz: `vlmedge index` makes one"):
        load_index(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"text\.npz is no index: make it again"):
        load_index(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", vectors=np.zeros(3))
    with pytest.raises(InputError, match=r"other\.npz is no index: make it again"):
        load_index(tmp_path / "other.npz")
    wrong = {"paths": np.array(["a"]), "folder": np.array(""), "checkpoint": np.array("")}
    np.savez(tmp_path / "shapes.npz", vectors=np.zeros((2, 3), np.float32), **wrong)
    with pytest.raises(InputError, match=r"shapes\.npz is no index: make it again"):
        load_index(tmp_path / "shapes.npz")
    with pytest.raises(InputError, match="cannot be written"):
        Index(np.zeros((1, 3), np.float32), ("a",), "", "").save(tmp_path / "no" / "index.npz")


def test_searches_that_make_no_sense_are_refused(
    model: package.Model, index: Index, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="give a text or an image, one of them"):
        model.search(index)
    with pytest.raises(InputError, match="top is 0: it must be at least 1"):
        model.search(index, "a cat", top=0)
    other = Index(index.vectors, index.paths, index.folder, "another")
    with pytest.raises(InputError, match="was made with another checkpoint: index it again"):
        model.search(other, "a cat")
    with pytest.raises(InputError, match=r"query of shape \[3\]: the index has vectors of"):
        index.search(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="no such folder"):
        model.index(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no pictures"):
        model.index(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of its 1 pictures can be read: give other files"):
        model.index(tmp_path)


def test_recall_counts_the_queries_whose_answer_is_near_the_top() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.3, 0.2]], np.float32)
    right = [0, 2, 2]
    assert [recall_at(scores, right, k) for k in (1, 2, 3)] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        1.0,
    ]
    with pytest.raises(InputError, match="k is 0: it must be at least 1"):
        recall_at(scores, right, 0)
    with pytest.raises(InputError, match=r"2 right answers for scores of \[3, 3\]"):
        recall_at(scores, [0, 1], 1)


def test_index_and_search_on_the_command_line(
    clip_bundle: Path, gallery: Path, tmp_path: Path, vlmedge: Callable[..., object]
) -> None:
    file = tmp_path / "index.npz"
    ran = vlmedge("index", clip_bundle, gallery, "--out", file, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["pictures"] == 11
    assert "broken.png" in ran.err
    ran = vlmedge("search", clip_bundle, file, "a red circle", "--top", 2, "--json")
    assert len(json.loads(ran.out)["images"]) == 2
    picture = next(gallery.glob("0*.png"))
    ran = vlmedge("search", clip_bundle, file, "--image", picture, "--top", 1)
    assert ran.out.split() == ["+1.000", picture.name]
    assert vlmedge("search", clip_bundle, file).code == 2


def test_pictures_of_several_vectors_are_found_by_their_nearest(
    tmp_path: Path, gallery: Path, vlmedge: Callable[..., object]
) -> None:
    bundle = bundle_of("blip2-itm", tmp_path / "bundle")
    model = package.load(bundle)
    model.index(gallery).save(tmp_path / "index.npz")
    index = load_index(tmp_path / "index.npz")
    assert index.vectors.shape == (11, 6, 20)  # of its 6 queries
    hits = model.search(index, "a red circle", top=11)
    text = model.embed_text("a red circle")
    every = {p: (v @ text).max() for p, v in zip(index.paths, index.vectors, strict=True)}
    assert dict(hits) == pytest.approx(every, abs=1e-6)
    assert [path for path, _ in hits] == sorted(every, key=lambda path: -every[path])
    picture = gallery / index.paths[4]
    path, cosine = model.search(index, image=picture, top=1)[0]
    assert (path, cosine) == (index.paths[4], pytest.approx(1.0, abs=1e-5))
    with pytest.raises(InputError, match=r"query of shape \[5, 20\]: the index has vectors of 20"):
        index.search(np.zeros((5, 20), np.float32))

    ran = vlmedge("embed", bundle, picture, "--text", "a cat")
    assert [line.count("[6, 20]") for line in ran.out.splitlines()] == [1, 0]
    out = tmp_path / "vectors.npy"
    ran = vlmedge("embed", bundle, picture, "--text", "a cat", "--out", out)
    assert (ran.code, out.exists()) == (1, False)
    assert "a picture has 6 vectors here and a text has one" in ran.err
    assert vlmedge("embed", bundle, picture, "--out", out).code == 0
    np.testing.assert_allclose(np.load(out)[0], model.embed_image(picture), atol=1e-6)


def test_match_and_infill_on_the_command_line(
    tmp_path: Path, pictures: list[Path], vlmedge: Callable[..., object]
) -> None:
    bundle = bundle_of("flava", tmp_path / "bundle")
    model = package.load(bundle)
    ran = vlmedge("match", bundle, pictures[0], "a cat", "two dogs", "--json")
    assert ran.code == 0, ran.err
    found = [entry["probability"] for entry in json.loads(ran.out)["texts"]]
    assert found == pytest.approx(model.match(pictures[0], ["a cat", "two dogs"]), abs=1e-6)
    ran = vlmedge("infill", bundle, pictures[0], "a <image> of a cat", "--top", 2, "--json")
    words = [entry["word"] for entry in json.loads(ran.out)["gaps"][0]]
    assert words == [word for word, _ in model.infill(pictures[0], "a <image> of a cat", 2)[0]]
    ran = vlmedge("infill", bundle, pictures[0], "a cat")
    assert (ran.code, "has no gap" in ran.err) == (1, True)
