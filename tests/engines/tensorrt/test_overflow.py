"""Numbers that are none: overflow in float16 is repaired, and NaN refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kit.fake_cuda import Notes
from kit.overflow import COMPONENT, overflowing
from kit.tensorrt import Use, build, engine, left

from vlmedge.bundle import Bundle
from vlmedge.cli import build as cli_build
from vlmedge.errors import BundleError
from vlmedge.parity import probe as probes
from vlmedge.parity.tolerances import compare
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.shelves.registry import ENGINES


def test_nan_in_float16_falls_back_to_float32(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    verdicts = iter(["image_embeds", ""])
    monkeypatch.setattr(engine, "not_finite", lambda graph, probe: next(verdicts))
    notes = Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",), keep_slower=True), notes)
    assert built.precision == "float32"
    assert notes.lines == ["vision_encoder: image_embeds is nan or inf in float16: built again"]


@pytest.mark.parametrize("version", ["trt103", "trt110"])
def test_overflow_in_float16_is_repaired_node_by_node(
    version: str,
    use: Use,
    clip_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(version)
    bundle = overflowing(clip_bundle, tmp_path)
    notes = Notes()
    (built,) = build(bundle, BuildOptions(components=(COMPONENT,)), notes)
    assert built.precision == "float16"
    count = len(built.restored)
    assert 0 < count < 20
    assert notes.lines == [
        f"{COMPONENT}: image_embeds is nan or inf in float16: {count} nodes in float32, built again"
    ]
    record = building.read_sidecar(built.folder)["restored"]
    assert [node["node"] for node in record] == list(built.restored)
    assert max(node["largest"] for node in record) > 65504
    graph = ENGINES["tensorrt"].open(bundle, COMPONENT)
    probe = probes.Probe(bundle)
    (feeds,) = probe.steps(graph)
    found = graph.run(feeds)["image_embeds"]
    expected = ENGINES["ort"].open(bundle, COMPONENT).run(feeds)["image_embeds"]
    assert compare(COMPONENT, "fp16", expected, found).passed
    graph.close()
    cli_build.show_built([built])
    assert f"float16, {count} nodes float32" in capsys.readouterr().out


def test_overflow_that_no_node_explains_falls_back_to_float32(
    use: Use, clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repairs are bounded: as many as there are margins, and then float32."""
    use("trt103")
    bundle = overflowing(clip_bundle, tmp_path)
    tried: list[str] = []
    compiled = engine.compile_component

    def note_precision(*arguments: Any, plain: bool) -> None:
        tried.append(arguments[3])
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", note_precision)
    monkeypatch.setattr(engine, "not_finite", lambda *_: "y" * (tried[-1] == "float16"))
    notes = Notes()
    (built,) = build(bundle, BuildOptions(components=(COMPONENT,)), notes)
    assert (built.precision, built.restored) == ("float32", ())
    assert 2 <= tried.count("float16") <= 3
    assert notes.lines[-1] == f"{COMPONENT}: y is nan or inf in float16: built again"


def test_weight_beyond_float16_falls_back_to_float32(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    compiled = engine.compile_component

    def refuse(*arguments: Any, plain: bool) -> None:
        if arguments[3] == "float16":
            raise engine.BeyondHalfError("w reaches 1.0e+05, beyond float16: build with float32")
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", refuse)
    notes = Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",), keep_slower=True), notes)
    assert built.precision == "float32"
    assert notes.lines == ["vision_encoder: w reaches 1.0e+05, beyond float16: built in float32"]


def test_nan_in_float32_is_refused(use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use("trt103")
    monkeypatch.setattr(engine, "not_finite", lambda graph, probe: "image_embeds")
    with pytest.raises(BundleError, match="image_embeds is nan or inf even in float32: check"):
        build(clip, BuildOptions(components=("vision_encoder",)))
    assert not [name for name in left(clip) if "trt" in name and not name.endswith(".timing")]


def test_outputs_are_looked_at_for_nan() -> None:
    probe: Any = probes  # graphs and components here are stand-ins
    component = SimpleNamespace(inputs=(), state=())
    for bad in (np.nan, np.inf):
        outputs = {"ids": np.ones(2, np.int64), "y": np.array([1, bad], np.float16)}
        graph = SimpleNamespace(
            component=component, reset=lambda: None, run=lambda feeds, out=outputs: out
        )
        known = SimpleNamespace(steps=lambda graph: [{}], learn=lambda outputs: None)
        assert probe.not_finite(graph, known) == "y"
    outputs["y"] = np.ones(2, np.float16)
    assert probe.not_finite(graph, known) == ""
