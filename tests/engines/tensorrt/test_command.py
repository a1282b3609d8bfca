"""`vlmedge build` and the commands that run on its engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.tensorrt import Use, build

from vlmedge.bundle import Bundle


def test_build_command_prints_what_it_built(use: Use, clip: Bundle, vlmedge: Any) -> None:
    use("trt103")
    ran = vlmedge("build", clip.path, "--quiet")
    assert ran.code == 0
    assert ["vision_encoder", "float16"] in [line.split()[:2] for line in ran.out.splitlines()]
    again = json.loads(vlmedge("build", clip.path, "--quiet", "--json").out)
    assert [row["reused"] for row in again] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "9"], "--level is 9: it must be 0 to 5"),
        (["--workspace", "0"], "--workspace is 0: it must be at least 1"),
        (["--axis", "batch=4:1:1"], "it must be MIN:OPT:MAX"),
        (["--axis", "depth=1"], "no axis 'depth'"),
        (["--component", "decoder"], "no component 'decoder'"),
        (["--engine", "ort"], "--engine 'ort' is not built"),
        (["--precision", "int3"], "--precision 'int3': it must be float32 or float16"),
    ],
)
def test_build_command_refuses(
    arguments: list[str], words: str, use: Use, clip: Bundle, vlmedge: Any
) -> None:
    use("trt103")
    ran = vlmedge("build", clip.path, *arguments)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert words in ran.err


def test_commands_run_on_the_engine_that_is_asked_for(
    use: Use, clip: Bundle, pictures: list[Path], vlmedge: Any
) -> None:
    gpu = use("trt103")
    build(clip)
    gpu.copied_bytes["up"] = 0
    ran = vlmedge(
        "classify", clip.path, pictures[0], "--labels", "red circle,cat", "--engine", "tensorrt"
    )
    assert ran.code == 0
    assert "%" in ran.out
    assert gpu.copied_bytes["up"] > 0


def test_unknown_engine_is_refused(clip: Bundle, pictures: list[Path], vlmedge: Any) -> None:
    ran = vlmedge("embed", clip.path, pictures[0], "--engine", "tensort")
    assert "no engine 'tensort': did you mean 'tensorrt'?" in ran.err


def test_check_only_and_version_go_together(clip: Bundle, vlmedge: Any) -> None:
    assert vlmedge("build", clip.path, "--check-only").code == 2
    assert vlmedge("build", clip.path, "--tensorrt", "10.3").code == 2
