"""Quantized layers have to be faster than float16, or they are dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kit.fake_cuda import Notes
from kit.tensorrt import Use, build, cache, engine, judging

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.parity import on_device as level4
from vlmedge.parity.tolerances import compare
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import BuildOptions


@pytest.mark.parametrize(("slow", "kept"), [("int8", "float16"), ("float16", "int8")])
def test_slower_of_int8_and_float16_is_dropped_with_its_figures(
    slow: str, kept: str, use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    times = iter([5.0, 2.0] if slow == "int8" else [2.0, 2.05])
    monkeypatch.setattr(judging, "time_ms", lambda graph, probe: next(times))
    notes = Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)), notes)
    figures = "5.00 ms, float16 2.00" if slow == "int8" else "2.00 ms, float16 2.05"
    fate = "dropped for it" if slow == "int8" else "kept"
    assert notes.lines == [f"vision_encoder: int8 takes {figures} ms: int8 is {fate}"]
    assert built.dropped == {slow: 5.0 if slow == "int8" else 2.05}
    assert building.read_sidecar(built.folder)["dropped"] == built.dropped
    plan = (built.folder / "engine.plan").read_bytes()
    assert (b"QuantizeLinear" in plan) == (kept == "int8")
    assert built.parity is not None and built.parity.passed
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


def test_faster_float16_that_fails_level_4_drops_nothing(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    bad = compare("vision_encoder", "int8", np.ones((1, 4)), -np.ones((1, 4)))
    verdicts = iter([(None, 5.0), (bad, 2.0)])
    monkeypatch.setattr(engine, "judge", lambda *_: level4.Verdict("its graph", *next(verdicts)))
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)))
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert built.dropped == {"float16": 2.0}


def test_slower_int8_is_kept_when_that_is_asked_for(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    options = BuildOptions(components=("vision_encoder",), keep_slower=True)
    (built,) = build(clip, options)
    assert built.dropped == {}
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert cache.last_options(clip, "vision_encoder", "NVIDIA Orin Nano").keep_slower


def test_float16_that_cannot_be_built_leaves_int8(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    compiled = engine.compile_component

    def refuse(*arguments: Any, plain: bool) -> None:
        if plain:
            raise BundleError("vision_encoder: no room")
        compiled(*arguments, plain=plain)

    monkeypatch.setattr(engine, "compile_component", refuse)
    notes = Notes()
    (built,) = build(clip, BuildOptions(components=("vision_encoder",)), notes)
    assert b"QuantizeLinear" in (built.folder / "engine.plan").read_bytes()
    assert notes.lines == [
        "vision_encoder: int8 was not timed against float: vision_encoder: no room"
    ]
