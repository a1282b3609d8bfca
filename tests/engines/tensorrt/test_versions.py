"""One code path for three versions of TensorRT, against stand-ins that run graphs on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit.fake_cuda import Notes
from kit.tensorrt import VERSIONS, Use, api, build, only, plan_head, tactics, token_feeds

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.run.model import Model
from vlmedge.shelves.build_options import BuildOptions
from vlmedge.shelves.registry import ENGINES


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_captions_are_those_of_onnx_runtime(
    version: str, precision: Any, use: Use, blip2: Bundle, pictures: list[Path]
) -> None:
    """Prefill, decode, state, beams and rows that end early go through the profiles."""
    use(version)
    build(blip2, BuildOptions(precision=precision))
    there, here = Model(blip2), Model(blip2, "tensorrt")
    paths = [str(p) for p in pictures]
    assert here.caption(paths) == there.caption(paths)
    assert here.caption(paths, num_beams=3) == there.caption(paths, num_beams=3)
    here.graphs.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_quantized_clip_classifies_as_onnx_runtime_does(
    version: str, use: Use, clip: Bundle, pictures: list[Path]
) -> None:
    use(version)
    build(clip)
    labels = ["red circle", "blue star", "green square"]
    for picture in pictures:
        expected = dict(Model(clip).classify(str(picture), labels))
        found = dict(Model(clip, "tensorrt").classify(str(picture), labels))
        for label, probability in expected.items():
            assert abs(found[label] - probability) < 0.05  # ORT rounds activations call by call
        assert max(found, key=found.__getitem__) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("version", VERSIONS)
def test_builder_is_told_by_the_names_of_its_version(version: str, use: Use, clip: Bundle) -> None:
    use(version)
    options = BuildOptions(level=2, workspace_mib=64, components=("vision_encoder",))
    (built,) = build(clip, options)
    head = plan_head(built.folder)
    assert head["version"] == VERSIONS[version]
    assert head["level"] == 2
    assert head["pools"] == {"WORKSPACE": 64 * 2**20}
    assert head["flags"] == (["FP16", "INT8"] if version == "trt86" else [])


def test_workspace_is_half_of_what_is_free(use: Use, clip: Bundle) -> None:
    gpu = use("trt103")
    gpu.free = 2**30
    (built,) = build(clip, only("vision_encoder"))
    assert plan_head(built.folder)["pools"] == {"WORKSPACE": 2**29}


@pytest.mark.parametrize("version", VERSIONS)
def test_tactic_sources_without_a_usable_library_are_left_out(
    version: str, use: Use, clip: Bundle
) -> None:
    """By name; in the child process it is this machine's libraries that are tried."""
    use(version)
    trt = api.load()
    config = trt.Builder(api.logger(trt, print)).create_builder_config()
    no_cudnn = tactics.leave_out_unusable(trt, config, lambda library: library.name != "cudnn")
    own = ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    others = [] if version == "trt110" else ["CUBLAS", "CUBLAS_LT", "CUDNN"]
    assert no_cudnn == others[2:]
    assert config.get_tactic_sources() == (1 << len(others + own)) - 1 - 4 * bool(others)
    (built,) = build(clip, only("vision_encoder"))
    here = [n for n in others if tactics.is_usable(tactics.LIBRARIES[n])]
    assert plan_head(built.folder)["sources"] == here + own


def test_a_library_is_usable_if_it_makes_a_handle(tmp_path: Path) -> None:
    """What is loaded already is what counts: its name is that of the CUDA that is used."""
    libc = tactics.Library("c", "getpid", "free", (6,))  # getpid is not 0: no handle
    assert not tactics.is_usable(libc)
    assert not tactics.is_usable(tactics.Library("c", "no_such_function", "free", (6,)))
    assert not tactics.is_usable(tactics.Library("cublas-of-nowhere", "a", "b", (12,)))
    made = tactics.Library("c", "sched_yield", "free", (6,))  # 0, and free takes null
    assert tactics.is_usable(made)
    nowhere = tmp_path / "maps"
    nowhere.write_text("7f00-7f01 r--p 0000 00:00 1    /nowhere/libc.so.6\n")
    assert not tactics.is_usable(made, nowhere)


@pytest.mark.parametrize("version", VERSIONS)
def test_progress_is_the_builder_s_outer_phase(version: str, use: Use, clip: Bundle) -> None:
    use(version)
    notes = Notes()
    build(clip, only("vision_encoder"), notes)
    monitored = version != "trt86"
    assert notes.totals == [None, 3] if monitored else [None]
    assert notes.advanced == (3 if monitored else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_stand_in_refuses_names_of_other_versions(version: str, use: Use) -> None:
    use(version)
    trt = api.load()
    config = trt.Builder(api.logger(trt, print)).create_builder_config()
    with pytest.raises(AttributeError):
        config.max_tactics = 3
    assert hasattr(trt, "IProgressMonitor") == (version != "trt86")
    assert hasattr(trt.BuilderFlag, "FP16") == (version != "trt110")
    assert hasattr(config, "progress_monitor") == (version != "trt86")


def test_int64_beyond_int32_is_refused_by_8_6(use: Use, clip: Bundle) -> None:
    use("trt86")
    build(clip, only("text_encoder"))
    graph = ENGINES["tensorrt"].open(clip, "text_encoder")
    feeds = token_feeds(clip, 1)
    feeds["input_ids"][0, 0] = 2**40
    with pytest.raises(
        InputError, match=r"'input_ids' holds 1099511627776: .* takes values of int32"
    ):
        graph.run(feeds)
    graph.close()
