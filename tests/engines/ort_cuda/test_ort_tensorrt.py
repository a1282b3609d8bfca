"""ONNX Runtime's providers that compile with TensorRT: what can be shown without one of them.

Their graphs run on the CPU's provider, their options are what the documentation has, and who lacks
a provider is told so in one line.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from kit.shelf import module

import vlmedge
from vlmedge.bundle import Bundle
from vlmedge.checkpoints.scenes import draw_scene
from vlmedge.errors import BundleError, MissingExtraError
from vlmedge.progress import SILENT
from vlmedge.run.tasks.graphs import Graphs
from vlmedge.shelves.registry import ENGINES

NAMES = ("ort_tensorrt", "ort_tensorrt_rtx")
sessions, common = (
    module("runtimes", "_ort_cuda.session"),
    module("runtimes", "_ort_cuda.tensorrt_provider"),
)
IMAGES = [draw_scene(i, "heldout").image for i in range(3)]


def on_cpu(name: str, *, allow_fallback: bool) -> Any:
    """Return an engine with the provider that every machine has in place of its own."""
    engine: Any = ENGINES[name]
    provider = sessions.Provider("CPUExecutionProvider", "cpu")
    return type(engine)(name, provider, lambda *_: {}, allow_fallback=allow_fallback)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bundle", ["blip2_bundle", "blip2_int8"])
def test_texts_are_those_of_the_cpu_engine(
    name: str, bundle: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = shutil.copytree(request.getfixturevalue(bundle), tmp_path / "bundle")
    ours, theirs = vlmedge.load(folder), vlmedge.load(folder)
    ours.graphs = Graphs(ours.bundle, on_cpu(name, allow_fallback=True))
    ours._context = type(ours._context)(ours.bundle, ours.graphs)
    assert ours.caption(IMAGES) == theirs.caption(IMAGES)
    assert ours.caption(IMAGES, num_beams=3) == theirs.caption(IMAGES, num_beams=3)
    (file,) = folder.glob(f"engines/{name}-*/decoder.onnx")
    graph = ir.load(file).graph
    assert {node.domain for node in graph} == {""}  # nothing that TensorRT's parser lacks
    kinds = Counter(v.dtype for node in graph for v in node.outputs)
    assert bool(kinds[ir.DataType.FLOAT16]) == (bundle == "blip2_int8")


@pytest.mark.parametrize("name", NAMES)
def test_a_node_on_the_cpu_is_named(name: str, clip_int8: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(clip_int8, tmp_path / "bundle"))
    with pytest.raises(
        BundleError, match=r"vision_encoder: CPUExec.* left \w+ '.+--allow-fallback"
    ):
        on_cpu(name, allow_fallback=False).open(bundle, "vision_encoder")
    assert on_cpu(name, allow_fallback=False).falling_back().open(bundle, "vision_encoder")


@pytest.mark.parametrize("name", NAMES)
def test_missing_provider_is_told_in_one_line(
    name: str, clip_int8: Path, pictures: list[Path], vlmedge: Any
) -> None:
    engine: Any = ENGINES[name]
    if engine.provider.name in sessions.ort.get_available_providers():
        pytest.skip("it is there")
    ran = vlmedge("embed", clip_int8, pictures[0], "--engine", name)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1
    assert f"has no {engine.provider.name}" in ran.err and "pip install onnxruntime-" in ran.err
    with pytest.raises(MissingExtraError, match=engine.provider.name):
        engine.judge(Bundle.load(clip_int8), SILENT)


def test_options_are_those_of_the_documentation(blip2_bundle: Path, tmp_path: Path) -> None:
    """One range covers a prompt into an empty cache and a step with the longest."""
    bundle = Bundle.load(blip2_bundle)
    ranges = common.ranges(bundle, bundle.spec.component("decoder"))
    found = {
        which: dict(one.split(":") for one in text.split(",")) for which, text in ranges.items()
    }
    assert found["min"]["inputs_embeds"] == "1x1x128"
    assert found["min"]["attention_mask"] == "1x1"
    assert found["opt"]["inputs_embeds"] == "1x1x128"  # a step
    tokens = int(found["max"]["inputs_embeds"].split("x")[1])
    past = found["max"]["past_key_values.0.key"].split("x")
    assert tokens > 1 and int(past[0]) == 40  # 8 rows of 5 beams
    assert found["min"]["past_key_values.0.key"].split("x")[2] == "0"
    first, second = (module("runtimes", name).options(tmp_path, ranges) for name in NAMES)
    assert first == {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": ranges["min"],
        "trt_profile_opt_shapes": ranges["opt"],
        "trt_profile_max_shapes": ranges["max"],
    }
    assert second == {
        "nv_runtime_cache_path": str(tmp_path),
        "nv_profile_min_shapes": ranges["min"],
        "nv_profile_opt_shapes": ranges["opt"],
        "nv_profile_max_shapes": ranges["max"],
    }


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("/nowhere/libplugin.so", r"NvTensorRTRTX\w+ cannot be loaded: .*/nowhere/libplugin.so"),
        ("", r"NvTensorRTRTX\w+ finds no GPU that it runs on"),
    ],
)
def test_plugin_that_does_not_load_or_finds_no_gpu_is_told(
    library: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a stand-in; ONNX Runtime, which is asked to load it, is not."""
    engine: Any = ENGINES["ort_tensorrt_rtx"]
    plugin = SimpleNamespace(get_ep_name=lambda: "standin", get_library_path=lambda: library)
    monkeypatch.setitem(sys.modules, engine.provider.plugin, plugin)
    known = {} if library else {engine.provider.plugin: "standin"}
    monkeypatch.setattr(sessions, "_PLUGGED", known)
    with pytest.raises(MissingExtraError, match=words):
        sessions.require(engine.provider)


def test_provider_options_go_to_the_session(
    clip_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine with the provider would be asked for, and in which order."""
    engine: Any = ENGINES["ort_tensorrt"]
    asked: list[Any] = []

    def refuse(graph: bytes, options: Any, providers: Any) -> None:
        asked.extend(providers)
        with pytest.raises(RuntimeError, match="disable_quant_qdq"):  # it takes Q/DQ as it is
            options.get_session_config_entry("session.disable_quant_qdq")
        raise RuntimeError("there is no GPU")

    monkeypatch.setattr(common, "require", lambda provider: None)
    monkeypatch.setattr(sessions.ort, "InferenceSession", refuse)
    bundle = Bundle.load(shutil.copytree(clip_int8, tmp_path / "bundle"))
    with pytest.raises(BundleError, match="cannot be opened on Tensorrt.*: there is no GPU"):
        engine.open(bundle, "vision_encoder")
    (first, own), (second, behind) = asked
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert behind == dict(sessions.CUDA.options)
    folder = Path(own["trt_engine_cache_path"])
    assert folder.is_relative_to(bundle.path / "engines") and folder.is_dir()
    assert own["trt_profile_max_shapes"].startswith("pixel_values:8x3x")
    assert dataclasses.replace(engine.provider, options=own).name == first


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_texts_on_the_gpu_are_those_of_the_cpu(
    name: str, blip2_bundle: Path, tmp_path: Path
) -> None:
    engine: Any = ENGINES[name]
    try:
        sessions.require(engine.provider)
    except MissingExtraError as error:
        pytest.skip(str(error))
    folder = shutil.copytree(blip2_bundle, tmp_path / "bundle")
    ours, theirs = vlmedge.load(folder, engine=name), vlmedge.load(folder)
    for beams in (1, 3):
        assert ours.caption(IMAGES, num_beams=beams) == theirs.caption(IMAGES, num_beams=beams)
