"""A deep-learning accelerator: the faster of it and the GPU is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.fake_cuda import FakeCuda, Notes
from kit.tensorrt import (
    Use,
    accelerators,
    build,
    builder,
    cache,
    copied,
    forbidden,
    judging,
    left,
    plan_head,
)

from vlmedge.bundle import Bundle
from vlmedge.cli import build as cli_build
from vlmedge.errors import BundleError, InputError
from vlmedge.parity import on_device
from vlmedge.run.model import Model
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import BuildOptions


@pytest.fixture
def accelerated(use: Use, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeCuda]:
    """Use a stand-in on a board with two accelerators."""

    def put(version: str) -> FakeCuda:
        monkeypatch.setenv("TRT_STANDIN_DLA", "2")
        return use(version)

    return put


def tower(**more: Any) -> BuildOptions:
    return BuildOptions(components=("vision_encoder",), **more)


@pytest.mark.parametrize("version", ["trt86", "trt103"])
@pytest.mark.parametrize("faster", ["GPU", "DLA"])
def test_faster_of_gpu_and_dla_is_kept_with_the_other_s_figure(
    version: str,
    faster: str,
    accelerated: Use,
    clip_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerated(version)
    bundle, notes = copied(clip_bundle, tmp_path), Notes()
    times = iter([2.0, 1.0] if faster == "DLA" else [2.0, 1.99])
    monkeypatch.setattr(judging, "time_ms", lambda graph, probe: next(times))
    (built,) = build(bundle, tower(dla="faster"), notes)
    head = plan_head(built.folder)
    assert built.dla is (faster == "DLA")
    assert built.dropped == ({"GPU": 2.0} if faster == "DLA" else {"DLA": 1.99})
    assert notes.lines[-1].endswith(f": the {faster} is kept")
    assert head["dla_core"] == (0 if faster == "DLA" else None)
    if faster == "DLA":
        assert head["flags"] == ["FP16", "GPU_FALLBACK"]
        assert head["profiles"] == [{"pixel_values": [[1, 3, 64, 64]] * 3}]
    assert sorted(f.name for f in built.folder.iterdir()) == ["engine.json", "engine.plan"]


def test_dla_runs_what_was_built_for_it_row_by_row(
    accelerated: Use, clip: Bundle, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an int8 bundle it is the plain graph: Q/DQ are not for a DLA before 11."""
    accelerated("trt103")
    (built,) = build(clip, tower(dla="always"))
    assert (built.dla, set(built.dropped)) == (
        True,
        {"int8", "float16", "GPU"} & set(built.dropped),
    )
    assert "GPU" in built.dropped
    assert b"QuantizeLinear" not in (built.folder / "engine.plan").read_bytes()
    paths = [str(picture) for picture in pictures]
    here, there = Model(clip, "tensorrt"), Model(clip)
    found, expected = here.embed_image(paths), there.embed_image(paths)
    assert (np.sum(found * expected, axis=1) > 0.99).all()
    cli_build.show_built([built])
    marked = "float16 on the DLA (experimental)"
    assert marked in " ".join(capsys.readouterr().out.split())
    (recorded,) = on_device.recorded(clip)
    assert recorded.engine.endswith(marked)


def test_dla_is_in_the_key_and_in_what_is_built_again(accelerated: Use, clip: Bundle) -> None:
    accelerated("trt103")
    (plain,) = build(clip, tower())
    notes = Notes()
    (tried,) = build(clip, tower(dla="always"), notes)
    assert "vision_encoder: built again: dla was off and is always" in notes.lines
    assert (plain.folder.name != tried.folder.name, tried.reused) == (True, False)
    assert build(clip, tower(dla="always"))[0].reused
    assert cache.last_options(clip, "vision_encoder", "NVIDIA Orin Nano").dla == "always"


@pytest.mark.parametrize(
    ("version", "cores", "options", "words"),
    [
        ("trt110", "2", {}, r"TensorRT 11\.0\.0 has no DLA \(8\.5 to 10\.7, and 11\.4\.1 on AGX"),
        ("trt103", "0", {}, r"NVIDIA Orin Nano has no DLA \(Xavier, Orin NX and AGX Orin have\)"),
        (
            "trt103",
            "2",
            {"components": ("text_encoder",)},
            "text_encoder: none is a vision tower of fix",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["faster", "always", "auto"])
def test_dla_is_refused_where_there_is_none_and_auto_does_without(
    version: str,
    cores: str,
    options: dict[str, Any],
    words: str,
    mode: Any,
    use: Use,
    clip: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRT_STANDIN_DLA", cores)
    use(version)
    wanted = BuildOptions(dla=mode, **({"components": ("vision_encoder",)} | options))
    if mode == "auto":
        notes = Notes()
        (built,) = build(clip, wanted, notes)
        assert not built.dla
        told = any("built for the GPU alone: " in line for line in notes.lines)
        assert told == (built.component == "vision_encoder")
        return
    monkeypatch.setattr(builder, "_run", forbidden)
    with pytest.raises(InputError, match=words):
        build(clip, wanted)


def test_auto_leaves_a_tower_of_matrix_products_to_the_gpu(
    accelerated: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated("trt103")
    notes = Notes()
    (built,) = build(clip, tower(dla="auto"), notes)
    assert not built.dla
    assert any(
        line.endswith("% of its products' weights are convolutions, and a DLA runs no others")
        for line in notes.lines
    )
    monkeypatch.setattr(accelerators, "CONVOLUTIONS", 0.0)
    clip_again = Bundle.load(clip.path)
    building.clean_engines(clip.path)
    (built,) = build(clip_again, tower(dla="auto"))
    assert {"GPU", "DLA"} & set(built.dropped)


def test_decoder_is_never_for_a_dla(accelerated: Use, blip2: Bundle) -> None:
    accelerated("trt103")
    with pytest.raises(InputError, match="decoder: none is a vision tower of fixed sizes"):
        build(blip2, BuildOptions(components=("decoder",), dla="always"))


def test_failed_dla_leaves_the_gpu_s_engine_unless_it_must_be(
    accelerated: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated("trt103")
    monkeypatch.setenv("TRT_STANDIN_FAULT", "dla")
    notes = Notes()
    (built,) = build(clip, tower(dla="faster"), notes)
    assert not built.dla
    assert notes.lines[-1].startswith("vision_encoder: no DLA: ")
    before = left(clip)
    with pytest.raises(BundleError, match=r"TensorRT cannot build it: Error Code 1: DLA"):
        build(clip, tower(dla="always"))
    assert left(clip) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dla": "yes"}, "dla 'yes': it must be off, auto, faster or always"),
        ({"dla": "always", "precision": "float32"}, "a DLA computes in float16 or int8"),
    ],
)
def test_impossible_dla_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BuildOptions(**options)
