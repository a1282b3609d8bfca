"""Bundles of manifest format 1 open, answer, and are checked and quantized as they were.

tests/format1/ has bundles that the last version of that format has written, of random checkpoints,
and what it answered. Only the stack traces were taken out of the graphs: they name folders.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import msgspec
import numpy as np
import pytest
from PIL import Image

import vlmedge
from vlmedge.bundle import Bundle, encode, read_manifest
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import BundleError
from vlmedge.make.check import check
from vlmedge.make.quantize import quantize
from vlmedge.spec import FrontEnd, ImageFrontEnd, ModelSpec, TextFrontEnd, VideoFrontEnd
from vlmedge.spec.manifest import FORMAT
from vlmedge.spec.manifest_v1 import upgraded

KEPT = Path(__file__).with_name("format1")
ANSWERS = json.loads((KEPT / "answers.json").read_text())
PICTURE = Image.fromarray(draw_scene(0, "heldout").image)
ASKED: dict[str, Callable[[vlmedge.Model], Any]] = {
    "vit-float32": lambda model: model.classify(PICTURE),
    "clip-int8": lambda model: model.classify(PICTURE, ["a cat", "a red star"]),
    "instructblip-float32": lambda model: model.ask(PICTURE, "what?", max_tokens=8),
    "llava-next-video-float32": lambda model: model.ask(_turning(), "what?", max_tokens=8),
}
TABLES: dict[str, dict[str, type[FrontEnd]]] = {
    "vit-float32": {"pixel_values": ImageFrontEnd},
    "clip-int8": {"pixel_values": ImageFrontEnd, "input_ids": TextFrontEnd},
    "instructblip-float32": {
        "pixel_values": ImageFrontEnd,
        "input_ids": TextFrontEnd,
        "qformer_input_ids": TextFrontEnd,
    },
    "llava-next-video-float32": {
        "pixel_values": ImageFrontEnd,
        "pixel_values_videos": VideoFrontEnd,
        "input_ids": TextFrontEnd,
    },
}


def _turning() -> vlmedge.Video:
    return vlmedge.Video(np.stack([np.asarray(PICTURE.rotate(90 * i)) for i in range(4)]))


def unpacked(name: str, folder: Path) -> Path:
    with ZipFile(KEPT / f"{name}.zip") as archive:
        archive.extractall(folder / name)
    return folder / name


def edited(bundle: Path, field: str, value: object) -> Path:
    """Change one field of the spec in a manifest."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["spec"][field] = value
    file.write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("name", ASKED)
def test_bundle_of_format_1_answers_as_it_did(name: str, tmp_path: Path) -> None:
    folder = unpacked(name, tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
    found, recorded = ASKED[name](vlmedge.load(folder)), ANSWERS[name]
    if isinstance(recorded, str):
        assert found == recorded
        return
    close = 0.02 if name.endswith("int8") else 1e-4
    assert dict(found) == pytest.approx(dict(recorded), abs=close)


@pytest.mark.parametrize("name", TABLES)
def test_fields_of_format_1_become_a_table(name: str, tmp_path: Path) -> None:
    folder = unpacked(name, tmp_path)
    before = json.loads((folder / "manifest.json").read_text())["spec"]
    manifest = Bundle.load(folder).manifest
    assert manifest.format == FORMAT
    spec = manifest.spec
    assert {key: type(front) for key, front in spec.front_ends.items()} == TABLES[name]
    assert spec.pixels == "pixel_values"
    for field in ("image", "video", "text", "instruction"):
        found = json.loads(msgspec.json.encode(getattr(spec, field)))
        assert without_kinds(found) == before[field], field


def without_kinds(front: Any) -> Any:
    """Take off what format 1 did not have."""
    if not isinstance(front, dict):
        return front
    kept = {name: without_kinds(value) for name, value in front.items()}
    return kept if "tile_size" in kept else {n: v for n, v in kept.items() if n != "kind"}


def test_upgraded_manifest_is_written_and_read_as_the_present_one(tmp_path: Path) -> None:
    folder = unpacked("llava-next-video-float32", tmp_path)
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_bytes(encode(manifest))
    assert json.loads((folder / "manifest.json").read_text())["format"] == FORMAT
    assert Bundle.load(folder).manifest == manifest


def test_bundle_of_format_1_is_checked_and_quantized(tmp_path: Path) -> None:
    """Both write a manifest, which is of the present format then."""
    folder, checkpoint = unpacked("vit-float32", tmp_path), unpacked("vit-checkpoint", tmp_path)
    assert check(folder, str(checkpoint)).passed
    checked = vlmedge.load(folder)
    assert checked.bundle.verified
    assert dict(checked.classify(PICTURE)) == pytest.approx(dict(ANSWERS["vit-float32"]), abs=1e-4)
    again = unpacked("vit-float32", tmp_path / "again")
    quantized = quantize(again, "int8", tmp_path / "vit-int8", against=str(checkpoint))
    assert quantized.verified
    for bundle in (folder, quantized.path):
        assert json.loads((bundle / "manifest.json").read_text())["format"] == FORMAT


def test_broken_front_end_of_format_1_is_refused_by_its_tensor(tmp_path: Path) -> None:
    folder = unpacked("clip-int8", tmp_path)
    with pytest.raises(BundleError, match=r"got `int` - at `\$\.spec\.front_ends\[\.\.\.\]`"):
        Bundle.load(edited(folder, "text", 8))
    with pytest.raises(BundleError, match=r"unknown field `txt`"):
        Bundle.load(edited(edited(folder, "text", None), "txt", None))


def test_manifest_without_a_spec_is_refused(tmp_path: Path) -> None:
    assert upgraded({"format": 1, "spec": None}) == {"format": FORMAT, "spec": None}
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(BundleError, match=r"manifest\.json is broken: .*export the model again"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["input_ids", "qformer_input_ids"])
def test_ids_that_are_not_made_of_texts_are_refused(name: str, tmp_path: Path) -> None:
    folder = unpacked("vit-float32", tmp_path)
    file = folder / "manifest.json"
    file.write_bytes(encode(read_manifest(folder)))
    table = json.loads(file.read_text())["spec"]["front_ends"]
    edited(folder, "front_ends", {name: table["pixel_values"]})
    with pytest.raises(BundleError, match=f"front end of '{name}': its kind must be 'text'"):
        Bundle.load(folder)


def test_kind_of_front_end_that_is_unknown_is_refused(tmp_path: Path) -> None:
    folder = unpacked("vit-float32", tmp_path)
    (folder / "manifest.json").write_bytes(encode(read_manifest(folder)))
    edited(folder, "front_ends", {"input_features": {"kind": "audio"}})
    with pytest.raises(BundleError, match=r"is broken: Invalid value 'audio' .*front_ends"):
        Bundle.load(folder)


def test_pictures_become_the_tensor_that_the_table_names() -> None:
    front = ImageFrontEnd("exact", (8, 8), "bicubic", None, 1 / 255, (0, 0, 0), (1, 1, 1))
    assert ModelSpec("x", (), {}, {"pixels": front}).pixels == "pixels"
    clips = ModelSpec("x", (), {}, {"pixel_values_videos": VideoFrontEnd(front, 8)})
    assert (clips.pixels, clips.image, clips.video) == (
        "pixel_values",
        None,
        VideoFrontEnd(front, 8),
    )
    assert (clips.text, clips.instruction) == (None, None)
