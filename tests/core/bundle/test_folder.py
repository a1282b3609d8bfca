"""A bundle is whole, or it is refused by name; and it is written whole, or not at all."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import jsonschema
import msgspec
import pytest

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import new_bundle, stored_files, write_manifest
from vlmedge.errors import BundleError
from vlmedge.files import replace_file
from vlmedge.graphs.portable import load_graph
from vlmedge.spec import Component, ModelSpec, TensorSpec
from vlmedge.spec import manifest as words
from vlmedge.spec.manifest import CheckpointId, Manifest

SCHEMA = Path(vlmedge.__file__).with_name("manifest.schema.json")


def make(folder: Path) -> Path:
    """Write a bundle of one file."""
    with new_bundle(folder) as partial:
        (partial / "graphs").mkdir()
        (partial / "graphs" / "x.onnx").write_bytes(b"graph")
        tensor = TensorSpec("pixel_values", "float32", ("batch", 3, 32, 32))
        spec = ModelSpec("clip", (Component("x", (tensor,), ()),), tasks={})
        identity = CheckpointId("tiny", None, "0" * 64)
        files = stored_files(partial)
        write_manifest(
            partial, Manifest(words.FORMAT, "0", identity, "float32", spec, (), files, {})
        )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "b")


def edit(folder: Path, **fields: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_bundle_loads_what_was_written(folder: Path) -> None:
    bundle = Bundle.load(folder)
    assert bundle.spec.component("x").inputs[0].shape == ("batch", 3, 32, 32)
    assert not bundle.verified
    assert Bundle.load(folder) == bundle


def test_file_that_is_used_and_not_named_is_refused(folder: Path) -> None:
    """Whatever lies outside has no digest, and no place in a bundle."""
    spec = json.loads((folder / "manifest.json").read_text())["spec"]
    text = {"kind": "text", "tokenizer": "../../secret.json"}
    text |= {"max_tokens": 8, "pad_id": 0, "padding_side": "right"}
    table = {"file": "../table.bin", "offset_bytes": 0, "dtype": "float32", "shape": [1, 1]}
    labels = {"kind": "label", "encode": ["x"], "output": "y", "labels": "/etc/hostname"}
    renamed = [{**spec["components"][0], "name": "../x"}]
    for fields, name in (
        ({"spec": {**spec, "front_ends": {"input_ids": text}}}, "../../secret.json"),
        ({"spec": {**spec, "tasks": {"classify": labels}}}, "/etc/hostname"),
        ({"spec": {**spec, "components": renamed}}, "graphs/../x.onnx"),
        ({"embeddings": table}, "../table.bin"),
    ):
        before = (folder / "manifest.json").read_bytes()
        edit(folder, **fields)
        message = f"{name!r} is used but not listed in the manifest: do not use this bundle"
        with pytest.raises(BundleError, match=re.escape(message)):
            Bundle.load(folder)
        (folder / "manifest.json").write_bytes(before)
    Bundle.load(folder)


def test_graph_that_is_none_is_refused(folder: Path) -> None:
    (folder / "graphs" / "x.onnx").write_bytes(b"\x08\x0a\xff\xff")
    with pytest.raises(BundleError, match=r"x\.onnx cannot be read as ONNX \(.*\): copy it again"):
        load_graph(folder, "x")


def test_manifest_of_brackets_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="manifest.json cannot be read: export the model again"):
        Bundle.load(folder)


def test_bundle_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """Of two exports into one folder the first to end has it, unless the other may overwrite."""
    folder = tmp_path / "b"
    with pytest.raises(BundleError, match="b exists: give --overwrite"), new_bundle(folder):
        make(folder)
        before = (folder / "manifest.json").read_bytes()
    assert (folder / "manifest.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_verdict_that_cannot_be_written_is_one_line(folder: Path) -> None:
    bundle = Bundle.load(folder)
    (folder / "reports").write_text("a file")
    with pytest.raises(
        BundleError, match="cannot be written .*, and `check` writes its report into the"
    ):
        bundle.with_parity(None, b"{}")


def test_file_without_a_name_is_refused_as_the_folder_that_it_is(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        replace_file(Path("."), b"")


def test_manifest_schema_is_the_published_one(folder: Path) -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == json.loads(msgspec.json.encode(words.schema()))
    jsonschema.validate(json.loads((folder / "manifest.json").read_text()), published)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.load(tmp_path / "none")


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        Bundle.load(tmp_path)


def test_broken_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(folder)


def test_newer_format_is_refused(folder: Path) -> None:
    edit(folder, format=3)
    with pytest.raises(BundleError, match="of format 3, this vlmedge reads 1 to 2: update vlmedge"):
        Bundle.load(folder)


def test_manifest_with_wrong_type_is_refused_by_field(folder: Path) -> None:
    edit(folder, scheme=8)
    with pytest.raises(BundleError, match=r"Expected `str`, got `int` - at `\$\.scheme`"):
        Bundle.load(folder)


def test_missing_file_is_refused_by_name(folder: Path) -> None:
    (folder / "graphs" / "x.onnx").unlink()
    with pytest.raises(BundleError, match=r"graphs/x\.onnx is missing"):
        Bundle.load(folder)


def test_altered_file_is_refused_by_name(folder: Path) -> None:
    (folder / "graphs" / "x.onnx").write_bytes(b"Graph")
    with pytest.raises(BundleError, match=r"graphs/x\.onnx is not the file that was exported"):
        Bundle.load(folder)


def test_altered_file_with_its_old_time_is_found_by_a_thorough_load(folder: Path) -> None:
    Bundle.load(folder)
    file = folder / "graphs" / "x.onnx"
    before = file.stat()
    file.write_bytes(b"Graph")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="is not the file"):
        Bundle.load(folder, thorough=True)


def test_added_file_is_refused_by_name(folder: Path) -> None:
    (folder / "graphs" / "y.onnx").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"graphs/y\.onnx is not in the manifest: remove it"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\\..\\b", "C:x"])
def test_escaping_file_is_refused_by_name(folder: Path, name: str) -> None:
    edit(folder, files=[{"path": name, "sha256": "0", "bytes": 1}])
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(folder)


def test_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"graph")
    (folder / "graphs" / "x.onnx").unlink()
    (folder / "graphs" / "x.onnx").symlink_to(secret)
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(folder)


def test_read_only_bundle_loads(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        assert Bundle.load(folder).manifest.scheme == "float32"
    finally:
        folder.chmod(0o755)


def test_out_that_exists_is_refused_and_kept(folder: Path) -> None:
    with pytest.raises(BundleError, match="exists: give --overwrite"):
        make(folder)
    assert Bundle.load(folder)


def test_overwrite_replaces_a_bundle_but_no_other_folder(folder: Path, tmp_path: Path) -> None:
    with new_bundle(folder, overwrite=True) as partial:
        (partial / "manifest.json").write_text("new")
    assert (folder / "manifest.json").read_text() == "new"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(BundleError, match="is no bundle"),
        new_bundle(tmp_path / "home", overwrite=True),
    ):
        pass
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug")], ids=["ctrl-c", "bug"])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_bundle(tmp_path / "b") as partial:
        (partial / "half").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_terminated_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "b") as partial:
        (partial / "half").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the disk is full"), new_bundle(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be made"), new_bundle(tmp_path / "file" / "b"):
        pass
