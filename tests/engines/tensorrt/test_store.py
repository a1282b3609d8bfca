"""The store of engines: built once, built again when anything differs, and cleaned up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.fake_cuda import Notes
from kit.tensorrt import Use, api, build, engine, forbidden, left, only

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import AxisRange, BuildOptions
from vlmedge.shelves.registry import ENGINES


def test_engine_is_built_once(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    first = build(clip)
    monkeypatch.setattr(engine, "compile_component", forbidden)
    second = build(clip)
    assert [b.reused for b in first] == [False, False]
    assert [b.reused for b in second] == [True, True]
    assert [b.folder for b in first] == [b.folder for b in second]
    assert len([name for name in left(clip) if name.endswith(".timing")]) == 1
    assert not [name for name in left(clip) if name.startswith(".")]


def test_record_says_what_an_engine_is_for(use: Use, clip: Bundle) -> None:
    use("trt103")
    (built,) = build(clip, only("vision_encoder"))
    identity = building.read_sidecar(built.folder)["identity"]
    assert identity["component"] == "vision_encoder"
    assert identity["tensorrt"] == "10.3.0"
    assert (identity["gpu"], identity["compute_capability"]) == ("NVIDIA Orin Nano", "8.7")
    assert identity["precision"] == "float32"
    assert identity["profiles"] == [{"batch": "1:1:8"}]
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "10.3.1"}, "tensorrt was 10.3.0 and is 10.3.1"),
        ({"capability": "8.9"}, "compute_capability was 8.7 and is 8.9"),
        ({"name": "NVIDIA A2"}, "gpu was NVIDIA Orin Nano and is NVIDIA A2"),
        ({"precision": "float16"}, "precision was float32 and is float16"),
        ({"level": 1}, "level was None and is 1"),
        ({"axes": {"batch": AxisRange(1, 1, 2)}}, "profiles changed"),
    ],
)
def test_changed_field_is_named_and_built_again(
    change: dict[str, Any], words: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    build(clip, only("vision_encoder"))
    for name in ("name", "capability"):
        if name in change:
            monkeypatch.setattr(gpu, name, change[name])
    if "tensorrt" in change:
        monkeypatch.setattr(api.load(), "__version__", change["tensorrt"])
    asked = {k: v for k, v in change.items() if k in ("precision", "level", "axes")}
    options = BuildOptions(**{"precision": "float32", "components": ("vision_encoder",), **asked})
    notes = Notes()
    (built,) = build(clip, options, notes)
    assert not built.reused
    assert notes.lines[0] == f"vision_encoder: built again: {words}"


def test_changed_weights_are_another_engine(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    files = tuple(
        type(f)(f.path, "0" * 64, f.bytes) if f.path == "graphs/vision_encoder.bin" else f
        for f in clip.manifest.files
    )
    import msgspec

    other = Bundle(clip.path, msgspec.structs.replace(clip.manifest, files=files))
    notes = Notes()
    build(other, only("vision_encoder"), notes)
    assert notes.lines == ["vision_encoder: built again: weights changed"]


def test_another_machine_s_plan_is_left_alone_and_never_read(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use("trt103")
    (desktop,) = build(clip, only("vision_encoder"))
    monkeypatch.setattr(gpu, "name", "NVIDIA GeForce RTX 4090")
    (desktop.folder / "engine.plan").write_bytes(b"do not read me")
    build(clip, only("vision_encoder"))
    assert (desktop.folder / "engine.plan").read_bytes() == b"do not read me"
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "gone", "record"])
def test_broken_engine_is_built_again(damage: str, use: Use, clip: Bundle) -> None:
    use("trt103")
    (built,) = build(clip, only("vision_encoder"))
    plan, good = built.folder / "engine.plan", (built.folder / "engine.plan").read_bytes()
    if damage == "truncated":
        plan.write_bytes(good[: len(good) // 2])
    elif damage == "foreign":
        plan.write_bytes(good[::-1])
    elif damage == "gone":
        plan.unlink()
    else:
        (built.folder / "engine.json").write_text("{")
    notes = Notes()
    (again,) = build(clip, only("vision_encoder"), notes)
    assert not again.reused
    why = "engine.plan is not the file that was built"
    assert notes.lines == [f"vision_encoder: built again: {why}"]
    assert plan.read_bytes() == good


def test_open_keeps_to_the_options_of_the_build(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder", level=1, axes={"batch": AxisRange(1, 2, 4)}))
    monkeypatch.setattr(engine, "compile_component", forbidden)
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


def test_built_engine_opens_without_onnx_ir(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()


def test_what_cannot_be_built_runs_on_the_cpu_when_that_is_said(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use("trt103")

    def refuse(*_: Any, plain: bool) -> None:
        raise BundleError("vision_encoder: no")

    monkeypatch.setattr(engine, "compile_component", refuse)
    with pytest.raises(BundleError, match="no"):
        vlmedge.load(clip.path, engine="tensorrt").graphs["vision_encoder"]
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    model = vlmedge.load(clip.path, engine="tensorrt", allow_fallback=True)
    (ours,) = model.graphs["vision_encoder"].run({"pixel_values": pixels}).values()
    assert "vision_encoder: runs on the CPU, for vision_encoder: no" in caplog.text
    (theirs,) = (
        vlmedge.load(clip.path).graphs["vision_encoder"].run({"pixel_values": pixels}).values()
    )
    np.testing.assert_array_equal(ours, theirs)


def test_open_builds_what_is_missing_and_says_so(
    use: Use, clip: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    use("trt103")
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()
    assert "building vision_encoder: this takes minutes, once" in caplog.text


def test_read_only_bundle_has_its_engines_in_the_users_cache(
    use: Use, clip: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not bind root
    monkeypatch.setenv("VLMEDGE_CACHE", str(tmp_path / "cache"))
    (built,) = build(clip, only("vision_encoder"))
    assert built.folder.is_relative_to(tmp_path / "cache")
    assert not [name for name in left(clip) if name.startswith("trt-")]


def test_timings_are_handed_on(use: Use, clip: Bundle) -> None:
    use("trt103")
    build(clip)
    (file,) = (clip.path / "engines").glob("*.timing")
    assert file.name == "trt-nvidia-orin-nano-10.3.0.timing"
    assert file.read_bytes() == b"2"  # components


def test_engines_are_listed_and_cleaned(use: Use, clip: Bundle, vlmedge: Any) -> None:
    use("trt103")
    build(clip)
    listed = vlmedge("engines", "list", clip.path)
    assert listed.out.count("10.3.0, NVIDIA Orin Nano, float32") == 2
    rows = json.loads(vlmedge("engines", "list", clip.path, "--json").out)
    assert {row["identity"]["component"] for row in rows} == {"text_encoder", "vision_encoder"}
    assert vlmedge("engines", "clean", clip.path).out.startswith("2 engines removed, ")
    assert not [name for name in left(clip) if "trt" in name]
    assert "no engines" in vlmedge("engines", "list", clip.path).out
    Bundle.load(clip.path)


def test_engines_of_no_bundle_are_refused(tmp_path: Path, vlmedge: Any) -> None:
    ran = vlmedge("engines", "clean", tmp_path)
    assert (ran.code, "is no bundle" in ran.err) == (1, True)
