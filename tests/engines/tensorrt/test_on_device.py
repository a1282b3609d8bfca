"""Level 4: what an engine gives on its device is held against its portable graph."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from kit.tensorrt import VERSIONS, Use, build, builder, graphs, judging, only, plan_head

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.parity import on_device as level4
from vlmedge.shelves import engine_store as building
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.registry import ENGINES


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_engine_is_held_against_its_portable_graph(
    version: str, precision: Any, use: Use, blip2: Bundle
) -> None:
    use(version)
    for built in build(blip2, BuildOptions(precision=precision)):
        assert built.parity is not None and built.parity.passed
        allowed = "cosine >= 0.999" if precision == "float16" else "relative <= 0.0001"
        assert built.parity.tolerance == allowed
        assert built.latency_ms is not None and built.latency_ms > 0
        kept = building.read_sidecar(built.folder)["level4"]
        assert kept["against"].startswith("its graph on ONNX Runtime 1.")
        assert kept["parity"]["component"] == built.component
        cleared = ["TF32"] if precision == "float32" else []
        assert plan_head(built.folder)["cleared"] == cleared
    assert build(blip2, BuildOptions(precision=precision))[0].parity is not None  # kept


def test_engine_that_computes_something_else_fails(
    use: Use,
    clip: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    vlmedge: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use("trt103")
    ran = graphs.TrtGraph.run

    def off(graph: Graph, feeds: Any) -> dict[str, Array]:
        return {name: array[:, ::-1] for name, array in ran(graph, feeds).items()}

    monkeypatch.setattr(graphs.TrtGraph, "run", off)
    ran_build = vlmedge("build", clip.path, "--component", "vision_encoder")
    assert ran_build.code == 1
    assert "FAILED, cosine" in ran_build.out.replace("\n", " ")
    assert "vision_encoder on this device is not what its graph gives: try --prec" in ran_build.err
    ran_check = vlmedge("check", clip.path, "--engine", "tensorrt")
    assert ran_check.code == 1 and "FAILED, cosine" in ran_check.out
    assert "vision_encoder on NVIDIA Orin Nano is not what its portable" in ran_check.err
    ENGINES["tensorrt"].open(clip, "vision_encoder").close()
    assert "vision_encoder: its engine is not what its graph gives" in caplog.text  # every time


def test_board_without_onnx_runtime_is_not_compared(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")

    def missing(*_: object) -> None:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(judging, "_Portable", missing)
    (built,) = build(clip, only("vision_encoder"))
    assert built.parity is None
    assert built.latency_ms is not None


def test_board_without_memory_for_both_is_not_compared(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    weights = clip.path.joinpath("graphs/vision_encoder.bin").stat().st_size
    for more, compared in ((1.0, False), (2.0, True)):
        free = builder.RESERVE_BYTES + int(more * weights)
        monkeypatch.setattr(judging, "free_bytes", lambda free=free: free)
        (built,) = build(clip, only("vision_encoder", level=int(more)))
        assert (built.parity is not None) == compared


@pytest.mark.parametrize("read_only", [False, True])
def test_level_4_of_engines_is_shown_and_reported(
    read_only: bool,
    use: Use,
    clip: Bundle,
    vlmedge: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines of a bundle that cannot be written lie elsewhere, and what they say is read there."""
    use("trt103")
    engines, report = tmp_path / "cache", clip.path / "reports/parity.json"
    monkeypatch.setenv("VLMEDGE_CACHE", str(engines))
    before = json.loads(report.read_bytes())
    if read_only:
        may = os.access  # root may write what nobody may
        monkeypatch.setattr(os, "access", lambda p, m, **k: m != os.W_OK and may(p, m, **k))
    assert vlmedge("build", clip.path, "--keep-slower").code == 0
    assert engines.exists() == read_only
    ran = vlmedge("check", clip.path, "--engine", "tensorrt", "--json")
    found = json.loads(ran.out)
    assert (
        ran.code == 0 and ("is read-only: the result is not in its report" in ran.err) == read_only
    )
    names = [component.name for component in clip.spec.components]
    assert [one["component"] for one in found] == names
    for one in found:
        assert (one["engine"], one["device"]) == ("TensorRT 10.3.0, float16", "NVIDIA Orin Nano")
        assert one["verdict"]["parity"]["passed"] and one["verdict"]["latency_ms"] > 0
    now = json.loads(report.read_bytes())
    assert now.pop("level4", []) == ([] if read_only else found)
    assert now == {name: value for name, value in before.items() if name != "level4"}
    assert Bundle.load(clip.path, thorough=True).verified
    shown = vlmedge("info", clip.path).out
    assert ("TensorRT 10.3.0" in shown) == (not read_only)
    # what the processor's engine gives stands beside it
    ran = vlmedge("check", clip.path, "--quiet")
    assert ran.code == 0 and ran.out.count("passed, cosine") == 2 * len(names)
    assert "ONNX Runtime 1." in ran.out and "TensorRT 10.3.0" in ran.out


def test_level_4_of_an_older_graph_is_no_longer_shown(
    use: Use, clip: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("trt103")
    build(clip, only("vision_encoder"))
    assert [one.component for one in level4.recorded(clip)] == ["vision_encoder"]
    monkeypatch.setattr(level4, "digest", lambda file: "of another graph")
    assert level4.recorded(clip) == []


def test_level_4_of_what_is_not_built_is_refused(clip: Bundle, vlmedge: Any) -> None:
    ran = vlmedge("check", clip.path, "--engine", "tensorrt")
    assert ran.code == 1 and ran.out == ""
    assert ran.err.endswith("tensorrt has built nothing of it: run `vlmedge build` first\n")
